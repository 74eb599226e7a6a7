"""What do the messages of a worker give away?"""

from efsgd.audit.analytic import linear_inputs, singular_inputs
from efsgd.audit.attacks import DLG, INVERTING_GRADIENTS, Attack
from efsgd.audit.findings import Report, Row
from efsgd.audit.inversion import Inversion, invert
from efsgd.audit.labels import label_of
from efsgd.audit.membership import (
    auc_under_noise,
    likelihood_ratios,
    loss_scores,
    update_scores,
)
from efsgd.audit.observed import Message, Observed
from efsgd.audit.recording import Recording, observe
from efsgd.audit.report import report
from efsgd.audit.scores import (
    Separation,
    best_match,
    label_recovery,
    psnr,
    separation,
    ssim,
)
from efsgd.audit.several_steps import combine

__all__ = [
    "DLG",
    "INVERTING_GRADIENTS",
    "Attack",
    "Inversion",
    "Message",
    "Observed",
    "Recording",
    "Report",
    "Row",
    "Separation",
    "auc_under_noise",
    "best_match",
    "combine",
    "invert",
    "label_of",
    "label_recovery",
    "likelihood_ratios",
    "linear_inputs",
    "loss_scores",
    "observe",
    "psnr",
    "report",
    "separation",
    "singular_inputs",
    "ssim",
    "update_scores",
]
