def model_card(x): return "card"
