"""The steps of a run, one file each, in the order of planning and running."""

from harness.steps.base import Step
from harness.steps.concepts import Decide, ScoreConcepts, Thresholds
from harness.steps.consensus import Consensus
from harness.steps.detect import Combine, Detect
from harness.steps.postprocess import Postprocess
from harness.steps.predict import Predict
from harness.steps.prompts import Prompts
from harness.steps.retrieve import BaseFeatures, Features, Retrieve
from harness.steps.score import Score
from harness.steps.soup import Soup
from harness.steps.standin import Standin
from harness.steps.tiny import Tiny
from harness.steps.train import Train

STEPS: tuple[type[Step], ...] = (
    Tiny,
    Standin,
    BaseFeatures,
    Prompts,
    Train,
    Soup,
    Features,
    Retrieve,
    Predict,
    Consensus,
    Postprocess,
    Detect,
    Combine,
    Thresholds,
    Decide,
    ScoreConcepts,
    Score,
)
