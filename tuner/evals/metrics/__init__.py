"""Scores of generated text, each from 0 to 1, one function each.

A metric is a public function of a module here or of the user's own,
`(prediction: str, reference: str, row: rows.Row, **own) -> float`; `own` are
arguments that the config sets: `dict(name='regex', pattern='...')`. Columns of
the row's file are in `row.carried`, where config.data.carry names them.

A score of the whole set that is no mean over rows is a function `(predictions,
references, rows, **own) -> float`.

Every reference scores 1 against itself, and one that a metric cannot score
raises ValueError: so scoring the references against themselves, before anything
is trained, finds the unfit ones. Of a prediction nothing is asked: what a model
wrote is untrusted text, which never raises, never runs and never holds up; what
cannot be read scores 0.

`declare.metric` says of each whether it looks at the form of an answer alone
('format') or at what it says ('content').
"""
