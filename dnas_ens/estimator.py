"""A classifier of images as scikit-learn's users expect it: fit, predict, predict_proba, score."""

from __future__ import annotations

import tempfile
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.model_selection import train_test_split
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted

from dnas_ens.errors import UserError

if TYPE_CHECKING:
    import torch

    from dnas_ens.ensembles.ensemble import Ensemble


class EnsembleSearchClassifier(ClassifierMixin, BaseEstimator):
    """Searches an ensemble of networks on arrays of images and trains it, or spends a budget on one.

    Args:
        members: M, members that are searched and trained; not read where there is a budget.
        budget: A time such as "10m", or a number of epochs, spent as `dnas_ens.spend` does; None to search.
        preset: Of search and recipe, where there is no budget: "smoke", "micro", "fast" or "paper".
        validation_fraction: Share of the images, in (0, 1), that candidates and the temperature are fitted on.
        flip: Whether an image means the same after a horizontal flip.
        device: auto, cpu, cuda or cuda:N.
        random_state: Seed of split, search and training.
        n_jobs: Networks trained side by side on a CPU; None or 1 for one, -1 for one a thread. A script then needs
            ``if __name__ == "__main__":`` before what it does.

    Attributes:
        ensemble_: The `dnas_ens.Ensemble`, its temperature fitted; `save` keeps it.
        classes_: The K labels, sorted.
        pixel_range_: The least and the largest pixel seen by ``fit``, which become black and white; of uint8 images
            0 and 255.

    Example:
        >>> from sklearn.datasets import load_digits
        >>> digits = load_digits()
        >>> classifier = EnsembleSearchClassifier(budget=3).fit(digits.images[:300], digits.target[:300])
        >>> classifier.predict_proba(digits.images[300:302]).shape
        (2, 10)
    """

    def __init__(
        self,
        *,
        members: int = 5,
        budget: str | int | None = None,
        preset: str = "smoke",
        validation_fraction: float = 0.2,
        flip: bool = False,
        device: str = "auto",
        random_state: int = 0,
        n_jobs: int | None = None,
    ) -> None:
        self.members = members
        self.budget = budget
        self.preset = preset
        self.validation_fraction = validation_fraction
        self.flip = flip
        self.device = device
        self.random_state = random_state
        self.n_jobs = n_jobs

    def fit(self, X: npt.ArrayLike, y: npt.ArrayLike) -> EnsembleSearchClassifier:  # noqa: N803
        """Search and train.

        Args:
            X: Images, uint8 or floats, (N, H, W) of greys or (N, H, W, C) with C = 1 or 3, as wide as high.
            y: Labels (N,), of at least two classes.

        Raises:
            UserError: Images or labels of another form.
        """
        import dnas_ens as de
        from dnas_ens.data import ImageData, Split

        images, labels = np.asarray(X), np.asarray(y)
        check_classification_targets(labels)
        if labels.shape != images.shape[:1]:
            raise UserError(f"There are {len(images)} images and {len(labels)} labels.", "Give one label an image.")
        self.classes_, indices = np.unique(labels, return_inverse=True)
        whole = images.dtype == np.uint8
        self.pixel_range_ = (0.0, 255.0) if whole else (float(images.min()), float(images.max()))
        pixels = self._pixels(images)
        try:
            train, val = train_test_split(
                np.arange(len(labels)),
                test_size=self.validation_fraction,
                stratify=indices,
                random_state=self.random_state,
            )
        except ValueError as error:
            raise UserError(
                f"The images cannot be split into training and validation: {error}",
                "Give more images of each class, or another validation_fraction.",
            ) from error
        import torch

        target = torch.from_numpy(indices.astype(np.int64))
        learnt, fitted_on = (Split(pixels[index], target[index]) for index in (train, val))
        names = [str(each) for each in self.classes_]
        jobs = 1 if self.n_jobs is None else self.n_jobs
        if jobs < -1 or jobs == 0:
            raise UserError(f"n_jobs is {jobs}.", "Give None, 1 or more, or -1 for one a thread.")
        workers = 0 if jobs == -1 else jobs
        # There are no images to report on: score takes them.
        data = ImageData.from_splits("arrays", names, train=learnt, val=fitted_on, test=fitted_on, flip=self.flip)
        if self.budget is not None:
            with tempfile.TemporaryDirectory() as folder:
                self.ensemble_: Ensemble = de.spend(
                    data, self.budget, folder=folder, device=self.device, workers=workers, seed=self.random_state
                )
        else:
            found = de.search(
                data, members=self.members, preset=self.preset, device=self.device, seed=self.random_state
            )
            self.ensemble_ = de.retrain(found, data, device=self.device, workers=workers, seed=self.random_state)
        return self

    def predict_proba(self, X: npt.ArrayLike) -> npt.NDArray[np.float64]:  # noqa: N803
        """Return the averaged, tempered probabilities (N, K) of images as ``fit`` takes them.

        Raises:
            UserError: Images of another form, or plainly of another scale than those of ``fit``.
        """
        from dnas_ens.metrics.calibration import tempered

        check_is_fitted(self)
        probs, _ = self.ensemble_.averaged(self.ensemble_.predict_probs(self._pixels(np.asarray(X))))
        return tempered(probs, float(self.ensemble_.temperature))

    def predict(self, X: npt.ArrayLike) -> npt.NDArray[Any]:  # noqa: N803
        """Return the most probable label of each image, (N,)."""
        # First, for it says what to do where nothing was fitted.
        best = self.predict_proba(X).argmax(axis=1)
        labels: npt.NDArray[Any] = self.classes_[best]
        return labels

    def _pixels(self, images: npt.NDArray[Any]) -> torch.Tensor:
        """Return images as uint8 (N, C, H, W)."""
        import torch

        if images.ndim not in (3, 4) or images.shape[1] != images.shape[2] or images.dtype.kind not in "uif":
            raise UserError(
                f"The images are {images.dtype} of shape {images.shape}.",
                "Give numbers of shape (N, H, W) or (N, H, W, C), as wide as high; reshape rows of pixels.",
            )
        low, high = self.pixel_range_
        if images.dtype != np.uint8 or (low, high) != (0.0, 255.0):
            if not np.isfinite(images).all():
                raise UserError("Some pixels are not finite.", "Give finite numbers.")
            top = float(images.max()) if images.size else low
            # Some brightness more or less is no other scale.
            as_shares = images.dtype.kind == "f" and low >= 0 and high >= 10 and 0 < top <= 1
            if as_shares or top - low > 10 * (high - low):
                raise UserError(
                    f"The images have values up to {top:g}, and those of fit had values from {low:g} to {high:g}.",
                    "Give images of the same scale: all of 0 to 255, or all in [0, 1].",
                )
            scaled = (images.astype(np.float64) - low) / max(high - low, 1e-12) * 255
            images = np.clip(np.rint(scaled), 0, 255).astype(np.uint8)
        stacked = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
        return torch.from_numpy(np.ascontiguousarray(stacked))
