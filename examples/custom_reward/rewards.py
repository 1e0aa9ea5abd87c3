def bare_letter(completion: str, example: dict) -> float:
    return 1.0 if completion.strip() == example["larger"] else -1.0
