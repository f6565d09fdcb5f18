"""Networks that are not searched: WRN, ResNet, DenseNet and small ones, written from their papers."""

from dnas_ens.nn.reference_models.base import ReferenceModel
from dnas_ens.nn.reference_models.registry import REFERENCE_MODELS, model_from_spec, reference_model

__all__ = ["REFERENCE_MODELS", "ReferenceModel", "model_from_spec", "reference_model"]
