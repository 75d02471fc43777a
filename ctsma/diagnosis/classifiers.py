"""Out-of-fold OA probability of each knee: a Transformer over patch tokens, its comparators, and the controls.

tokens: one row a patch with knee_id, subject_id, compartment, the BIOMARKERS (any number of patches a knee, whole
compartments may be absent), and where known their predicted `<biomarker>_sd` and the position u, v, w in the bone's
own coordinates. labels: Series of 0/1 by knee_id. splits: DataFrame(subject_id, fold). Sizes are our choice.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import joblib
import numpy as np
import pandas as pd
import torch
from numpy import ndarray
from scipy.special import expit
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from torch import Tensor, nn

from ..cohort import BIOMARKERS, COMPARTMENTS, InputFault, check_splits
from .statistics import checked_labels

POSITION = ("u", "v", "w")
_SCORES = ("score", "score_without_attended", "score_without_random")


@dataclass(frozen=True)
class TransformerSettings:
    """Size and training of the patch Transformer; the published one states neither, so all is our choice.

    On made-up tokens of no cohort more layers, width or dropout gave the same AUC within its error; the learning rate
    is from the validation loss of `mr_reference` inside the training folds of the simulated `quick` cohort.
    """

    width: int = 16
    layers: int = 1
    heads: int = 4
    dropout: float = 0.2
    learning_rate: float = 5e-3
    weight_decay: float = 0.05
    max_epochs: int = 80
    patience: int = 20  # epochs without a better validation loss
    validation_share: float = 0.2  # of the training subjects, for early stopping only
    patches_per_step: int = 8  # random patches a knee sees in one step: regularises and bounds the cost
    features: tuple[str, ...] = ()  # empty: the biomarkers, their _sd and the position, as far as present


DEFAULT = TransformerSettings()


class PatchTransformer(nn.Module):
    """Encoder over tokens (knees, patches, features) without order; attention pooling; one logit a knee.

    The last features are the one-hot compartment, and each compartment has its own embedding of the others: the same
    BV/TV says one thing in the loaded compartment and another in the unloaded one.
    """

    def __init__(self, n_features: int, settings: TransformerSettings):
        super().__init__()
        width = settings.width
        self.embed = nn.Linear((n_features - len(COMPARTMENTS) + 1) * len(COMPARTMENTS), width)
        layer = nn.TransformerEncoderLayer(
            width, settings.heads, 2 * width, settings.dropout, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, settings.layers, enable_nested_tensor=False)
        self.attention, self.head = nn.Linear(width, 1), nn.Linear(width, 1)

    def forward(self, tokens: Tensor, absent: Tensor) -> tuple[Tensor, Tensor]:
        """Logit (knees,) and pooling weight (knees, patches), 0 where `absent` (knees, patches) is true."""
        values, place = tokens.split([tokens.shape[2] - len(COMPARTMENTS), len(COMPARTMENTS)], dim=2)
        apart = torch.cat([values, torch.ones_like(values[..., :1])], dim=2)[..., None] * place[..., None, :]
        hidden = self.encoder(self.embed(apart.flatten(2)), src_key_padding_mask=absent)
        weights = self.attention(hidden).squeeze(-1).masked_fill(absent, -torch.inf).softmax(dim=1)
        return self.head((weights.unsqueeze(-1) * hidden).sum(dim=1)).squeeze(-1), weights


def cross_validate_diagnosis(
    tokens: pd.DataFrame, labels: pd.Series, splits: pd.DataFrame, settings=DEFAULT, seed: int = 0, n_jobs: int = 1
) -> pd.DataFrame:
    """OA probability of every knee from a Transformer that never saw its subject.

    Standardisation, weights and early stopping come from the training folds alone. Same seed, same scores.
    Returns DataFrame(knee_id, subject_id, fold, score). Raises InputFault for a knee without patch or label, NaN,
    labels not 0/1, a subject in two folds, one class only in a training fold.
    """
    return cross_validate_arms({"": tokens}, labels, splits, settings, [seed], n_jobs).drop(columns=["arm", "seed"])


def cross_validate_arms(
    tokens_by_arm: Mapping[str, pd.DataFrame],
    labels: pd.Series,
    splits: pd.DataFrame,
    settings: TransformerSettings = DEFAULT,
    seeds: Sequence[int] = (0,),
    n_jobs: int = 1,
) -> pd.DataFrame:
    """`cross_validate_diagnosis` of many arms and seeds, all (arm, seed, fold) in parallel one-thread processes.

    Returns DataFrame(arm, seed, knee_id, subject_id, fold, score).
    """
    inputs = {arm: _inputs(tokens, labels, splits, settings) for arm, tokens in tokens_by_arm.items()}
    tasks = [(arm, seed, fold) for arm, data in inputs.items() for seed in seeds for fold in data[0]["fold"].unique()]
    with joblib.parallel_config(backend="loky", n_jobs=n_jobs, inner_max_num_threads=1):
        scores = joblib.Parallel()(
            joblib.delayed(_fold_scores)(inputs[arm], fold, settings, seed) for arm, seed, fold in tasks
        )
    frames = [s.assign(arm=arm, seed=seed) for (arm, seed, _), s in zip(tasks, scores, strict=True)]
    columns = ["arm", "seed", "knee_id", "subject_id", "fold", "score"]
    return pd.concat(frames).sort_values(["arm", "seed", "knee_id"], ignore_index=True)[columns]


def explain_diagnosis(
    tokens: pd.DataFrame, labels: pd.Series, splits: pd.DataFrame, settings=DEFAULT, seed: int = 0, share: float = 0.25
) -> pd.DataFrame:
    """What the out-of-fold score of each knee rests on, patch by patch, and the test of attention by deletion.

    Returns the rows of tokens with attention (sums to 1 a knee), contribution (logit with all patches minus logit
    without this one), score, and score_without_attended, score_without_random: the knee's score after deleting
    `share` of its patches, the most attended or random ones. Attention explains only if the former hurts more.
    """
    data = knees, _, absent, rows = _inputs(tokens, labels, splits, settings)
    rng, frames = np.random.default_rng(seed), []
    for fold in knees["fold"].unique():
        model, scaled = _fit_fold(data, fold, settings, seed)
        for knee in np.flatnonzero(knees["fold"] == fold):
            kept = rows[knee, ~absent[knee]]
            frames.append(tokens.iloc[kept].assign(**_explain(model, scaled[knee, : len(kept)], share, rng)))
    return pd.concat(frames).sort_index()


@torch.no_grad()
def _explain(model: PatchTransformer, tokens: Tensor, share: float, rng: np.random.Generator) -> dict:
    n = len(tokens)
    logit, attention = (out[0] for out in model(tokens[None], torch.zeros(1, n, dtype=torch.bool)))
    count = min(int(np.ceil(share * n)), n - 1)
    removed = torch.eye(n + 2, n, dtype=torch.bool)
    removed[n, attention.argsort(descending=True)[:count]] = True
    removed[n + 1, rng.permutation(n)[:count]] = True
    if n == 1:  # nothing is left to judge by: the patch is the whole answer
        return {"attention": 1.0, "contribution": logit.item(), **dict.fromkeys(_SCORES, logit.sigmoid().item())}
    without = model(tokens.expand(n + 2, -1, -1), removed)[0]
    scores = torch.stack([logit, without[n], without[n + 1]]).sigmoid().tolist()
    result = {"attention": attention.numpy(), "contribution": (logit - without[:n]).numpy()}
    return result | dict(zip(_SCORES, scores, strict=True))


def _inputs(
    tokens: pd.DataFrame, labels: pd.Series, splits: pd.DataFrame, settings: TransformerSettings
) -> tuple[pd.DataFrame, ndarray, ndarray, ndarray]:
    """Knees, padded values (knees, patches, features + compartments), absent (knees, patches), row of each patch."""
    known = (*BIOMARKERS, *(f"{name}_sd" for name in BIOMARKERS), *POSITION)
    features = list(settings.features) or [name for name in known if name in tokens]
    bad = [name for name in features if name not in tokens or not np.isfinite(tokens[name]).all()]
    if not features:
        raise InputFault("tokens", "hold no feature", f"give some of {', '.join(known)}")
    if bad or not set(tokens["compartment"]) <= set(COMPARTMENTS):
        fault = f"hold NaN or nothing in {', '.join(bad)}" if bad else "name an unknown compartment"
        raise InputFault("tokens", fault, "leave such patches out")
    knees = _knees(tokens, labels, splits)
    one_hot = tokens["compartment"].to_numpy()[:, None] == np.array(COMPARTMENTS)
    flat = np.hstack([tokens[features].to_numpy(dtype=np.float64), one_hot])
    codes = knees.index.get_indexer(tokens["knee_id"])
    place = tokens.groupby("knee_id").cumcount().to_numpy()
    rows = np.full((len(knees), place.max() + 1), -1)
    rows[codes, place] = np.arange(len(tokens))
    return knees, flat[rows], rows < 0, rows


def _knees(rows: pd.DataFrame, labels: pd.Series, splits: pd.DataFrame) -> pd.DataFrame:
    """subject_id, oa, fold by knee_id, after every check of subjects, labels and folds."""
    owners = rows[["knee_id", "subject_id"]].drop_duplicates().set_index("knee_id")["subject_id"].sort_index()
    if odd := sorted(set(labels.index) ^ set(owners.index)):
        raise InputFault("knees", f"{', '.join(map(str, odd))} lack patch or label", "give both or neither")
    if owners.index.has_duplicates or labels.index.has_duplicates:
        raise InputFault("knees", "are named twice", "give each knee one subject and one label")
    check_splits(splits, rows)
    oa = checked_labels(labels.reindex(owners.index))[0].astype(int)
    knees = pd.DataFrame({"subject_id": owners, "oa": oa})
    knees["fold"] = knees["subject_id"].map(splits.set_index("subject_id")["fold"])
    for fold in knees["fold"].unique():
        if knees.loc[knees["fold"] != fold, "oa"].nunique() < 2:
            raise InputFault(f"fold {fold}", "has one class only in training", "stratify the splits by label")
    return knees


def _fold_scores(data: tuple, fold: int, settings: TransformerSettings, seed: int) -> pd.DataFrame:
    knees, _, absent, _ = data
    model, scaled = _fit_fold(data, fold, settings, seed)
    test = (knees["fold"] == fold).to_numpy(copy=True)
    with torch.no_grad():
        score = model(scaled[test], torch.tensor(absent[test]))[0].sigmoid().numpy()
    return knees.loc[test, ["subject_id", "fold"]].assign(score=score.astype(float)).reset_index()


def _fit_fold(data: tuple, fold: int, settings: TransformerSettings, seed: int) -> tuple[PatchTransformer, Tensor]:
    """The model trained without this fold, and all tokens standardised by the training folds."""
    knees, values, absent, _ = data
    rng = np.random.default_rng([seed, int(fold)])
    training = (knees["fold"] != fold).to_numpy()
    seen = values[training][~absent[training]][:, : -len(COMPARTMENTS)]
    mean, sd = np.zeros(values.shape[2]), np.ones(values.shape[2])
    mean[: seen.shape[1]], sd[: seen.shape[1]] = seen.mean(axis=0), np.maximum(seen.std(axis=0), 1e-9)
    scaled = torch.from_numpy(((values - mean) / sd).astype(np.float32))
    validation = training & knees["subject_id"].isin(_held_out(knees[training], settings, rng)).to_numpy()
    with torch.random.fork_rng(devices=[]):  # initial weights and dropout know only torch's own generator
        torch.manual_seed(int(rng.integers(2**31)))
        oa, missing = (torch.tensor(np.array(a)) for a in (knees["oa"].to_numpy(np.float32), absent))
        sets = [(scaled[c], missing[c], oa[c]) for c in (training & ~validation, validation)]
        return _train(PatchTransformer(values.shape[2], settings), *sets, settings), scaled


def _held_out(knees: pd.DataFrame, settings: TransformerSettings, rng: np.random.Generator) -> list[str]:
    """Validation subjects, the same share of each class; at least one subject of a class stays in training."""
    classes = knees.groupby("subject_id")["oa"].max()
    shuffled = classes.iloc[rng.permutation(len(classes))]
    counts = (shuffled.value_counts() * settings.validation_share).apply(np.ceil).astype(int)
    groups = [shuffled.index[shuffled == oa] for oa in (0, 1)]
    return [s for oa, group in enumerate(groups) for s in group[: min(counts.get(oa, 0), len(group) - 1)]]


def _train(
    model: PatchTransformer, training: tuple, validation: tuple, settings: TransformerSettings
) -> PatchTransformer:
    """Full-batch AdamW on binary cross-entropy; the weights of the epoch with the least validation loss."""
    optimizer = torch.optim.AdamW(model.parameters(), settings.learning_rate, weight_decay=settings.weight_decay)
    loss_of, best, best_epoch, state = nn.functional.binary_cross_entropy_with_logits, np.inf, 0, None
    for epoch in range(settings.max_epochs):
        model.train()
        tokens, absent = _random_patches(*training[:2], settings.patches_per_step)
        optimizer.zero_grad()
        loss_of(model(tokens, absent)[0], training[2]).backward()
        optimizer.step()
        model.eval()
        with torch.no_grad():
            loss = loss_of(model(*validation[:2])[0], validation[2]).item()
        if not loss >= best:  # NaN where nobody could be held out: the last epoch stays
            best, best_epoch, state = loss, epoch, {k: v.clone() for k, v in model.state_dict().items()}
        elif epoch - best_epoch >= settings.patience:
            break
    model.load_state_dict(state)
    return model.eval()


def _random_patches(tokens: Tensor, absent: Tensor, count: int) -> tuple[Tensor, Tensor]:
    chosen = torch.rand(absent.shape).masked_fill(absent, 2).argsort(dim=1)[:, :count]
    return torch.take_along_dim(tokens, chosen[:, :, None], 1), torch.take_along_dim(absent, chosen, 1)


def cross_validate_tabular(
    features: pd.DataFrame, labels: pd.Series, splits: pd.DataFrame, model: str = "logistic", seed: int = 0
) -> pd.DataFrame:
    """Out-of-fold score of one row of numbers a knee: the comparators of the Transformer.

    features: index knee_id, column subject_id, the rest numeric; NaN takes the training mean. model: "logistic"
    (ridge, C = 1, a probability) or "svm" (RBF, C = 1; the logistic of its margin: ranks, not a probability).
    Returns and faults as `cross_validate_diagnosis`. Deterministic; `seed` reaches the solver only.
    """
    if model not in (kinds := {"logistic": LogisticRegression, "svm": SVC}):
        raise InputFault("model", f"is {model!r}", f"choose one of {', '.join(kinds)}")
    knees = _knees(features.rename_axis("knee_id").reset_index(), labels, splits)
    x = features.loc[knees.index].drop(columns="subject_id").to_numpy(dtype=float)
    score = np.zeros(len(knees))
    for fold in knees["fold"].unique():
        test = (knees["fold"] == fold).to_numpy()
        steps = SimpleImputer(keep_empty_features=True), StandardScaler(), kinds[model](random_state=seed)
        fitted = make_pipeline(*steps).fit(x[~test], knees["oa"][~test])
        score[test] = expit(fitted.decision_function(x[test]))
    return knees[["subject_id", "fold"]].assign(score=score).reset_index()


def compartment_means(tokens: pd.DataFrame, columns: Sequence[str] = BIOMARKERS) -> pd.DataFrame:
    """Features for `cross_validate_tabular`: mean of each column in each compartment, NaN where one is absent."""
    means = tokens.pivot_table(list(columns), "knee_id", "compartment", "mean", observed=False)
    means = means.reindex(columns=pd.MultiIndex.from_product([columns, COMPARTMENTS]))
    means.columns = [f"{column}_{compartment}" for column, compartment in means.columns]
    return means.assign(subject_id=tokens.groupby("knee_id")["subject_id"].first())


def permute_labels(labels: pd.Series, subjects: pd.Series, splits: pd.DataFrame, rng: np.random.Generator) -> pd.Series:
    """Control: labels moved between subjects (both Series by knee_id), all knees of a subject together.

    Subjects exchange within their fold and their number of knees: folds are stratified by label, and unbalanced
    ones would pull the AUC of a useless model below 0.5.
    """
    fold = subjects.map(splits.set_index("subject_id")["fold"])
    count = subjects.map(subjects.value_counts())
    permuted = labels.copy()
    for _, names in subjects.groupby([fold, count]):
        knees = np.array([group.index for _, group in names.groupby(names)])
        permuted[knees.ravel()] = labels[knees[rng.permutation(len(knees))].ravel()].to_numpy()
    return permuted


def shuffle_patches(tokens: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
    """Control: measurements moved between the patches of all knees within a compartment, so no patient is whole."""
    fixed = {"knee_id", "subject_id", "patch_id", "compartment", *POSITION}
    shuffled, measured = tokens.copy(), [column for column in tokens if column not in fixed]
    for rows in tokens.groupby("compartment", observed=True).indices.values():
        shuffled.iloc[rows, tokens.columns.get_indexer(measured)] = tokens[measured].iloc[rng.permutation(rows)]
    return shuffled


def remove_feature(tokens: pd.DataFrame, name: str) -> pd.DataFrame:
    """Control: tokens without "position", or without a biomarker and its predicted SD."""
    gone = POSITION if name == "position" else (name, f"{name}_sd")
    if not set(gone) & set(tokens.columns):
        raise InputFault("feature", f"{name!r} is not in the tokens", "name position or a biomarker")
    return tokens.drop(columns=list(gone), errors="ignore")
