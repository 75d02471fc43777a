"""Comparators of the Transformer: logistic regression and support vector machine."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.special import expit
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from ctsma.common import BIOMARKERS, COMPARTMENTS, InputError

from .inputs import knee_table

_MODELS = {"logistic": LogisticRegression, "svm": SVC}


def compartment_means(tokens: pd.DataFrame, columns: Sequence[str] = BIOMARKERS) -> pd.DataFrame:
    """Mean of each column by knee_id and compartment, NaN where the compartment is absent.

    Columns `<column>_<compartment>` and subject_id: features for `cross_validate_tabular`.
    """
    means = tokens.pivot_table(list(columns), "knee_id", "compartment", "mean", observed=False)
    means = means.reindex(columns=pd.MultiIndex.from_product([columns, COMPARTMENTS]))
    means.columns = [f"{column}_{compartment}" for column, compartment in means.columns]
    return means.assign(subject_id=tokens.groupby("knee_id")["subject_id"].first())


def cross_validate_tabular(
    features: pd.DataFrame, labels: pd.Series, splits: pd.DataFrame, model="logistic", seed=0
) -> pd.DataFrame:
    """Out-of-fold score of every knee from one row of numbers.

    Parameters
    ----------
    features : index knee_id, column subject_id, the rest numeric; NaN takes the training mean.
    labels, splits : as in `ctsma.diagnosis.inputs`.
    model : "logistic" (L2, C = 1; the score is a probability) or "svm" (RBF, C = 1; the score is
        the logistic of the margin, which ranks but is no probability). Both have the defaults of
        scikit-learn.
    seed : of the solver; the result does not depend on it.

    Returns
    -------
    DataFrame(knee_id, subject_id, fold, score). Raises InputError for another model and as
    `knee_table`.
    """
    if model not in _MODELS:
        raise InputError("model", f"is {model!r}", f"choose one of {', '.join(_MODELS)}")
    knees = knee_table(features.rename_axis("knee_id").reset_index(), labels, splits)
    x = features.loc[knees.index].drop(columns="subject_id").to_numpy(dtype=float)
    score = np.zeros(len(knees))
    for fold in knees["fold"].unique():
        test = (knees["fold"] == fold).to_numpy()
        imputer = SimpleImputer(keep_empty_features=True)
        pipeline = make_pipeline(imputer, StandardScaler(), _MODELS[model](random_state=seed))
        pipeline.fit(x[~test], knees["oa"][~test])
        score[test] = expit(pipeline.decision_function(x[test]))
    return knees[["subject_id", "fold"]].assign(score=score).reset_index()
