"""How much one request, and all of them together, may ask of the service."""

from __future__ import annotations

from dataclasses import dataclass

from guardkit.checks import check_number, check_whole
from guardkit.limits import MAX_BYTES, MAX_FRAMES, MAX_PIXELS
from guardkit.schema import InputError

EXPLAINED_PIXELS = 25_000_000  # of an image that gets a heat map: one is as large as the image, several times over


@dataclass(frozen=True)
class Limits:
    """Bounds of the service.

    Attributes:
        max_bytes: of one encoded image.
        max_request_bytes: of one request's body.
        max_pixels: of an image; an animation may have ten times as many in all its frames.
        max_frames: of an animation.
        max_images: in one request.
        max_queue: images that wait or are worked on, of all requests; one more is refused (429).
        max_queue_bytes: of all bodies that are held at once; more are refused (429).
        max_batch: images that the encoder takes at once; None: as many as it is set to.
        max_wait_ms: milliseconds that the encoder waits at most for images that are being read, to take them along.
        loaders: threads that decode images.
        read_timeout_s: seconds in which a body must have come.

    Raises:
        InputError: one is out of range, or a request that is allowed could never be taken.
    """

    max_bytes: int = 32 << 20
    max_request_bytes: int = 64 << 20
    max_pixels: int = MAX_PIXELS
    max_frames: int = MAX_FRAMES
    max_images: int = 64
    max_queue: int = 256
    max_queue_bytes: int = 512 << 20
    max_batch: int | None = None
    max_wait_ms: float = 5.0
    loaders: int = 2
    read_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        check_whole("max_bytes", self.max_bytes, 1, MAX_BYTES)
        for name in ("max_request_bytes", "max_pixels", "max_frames", "max_images", "max_queue", "max_queue_bytes"):
            check_whole(name, getattr(self, name), 1)
        check_whole("max_batch", self.max_batch, 1, optional=True)
        check_whole("loaders", self.loaders, 1, 256)
        check_number("max_wait_ms", self.max_wait_ms, "[0, 10000]")
        check_number("read_timeout_s", self.read_timeout_s, "(0, 3600]")
        for small, large in (("max_images", "max_queue"), ("max_request_bytes", "max_queue_bytes")):
            if getattr(self, small) > getattr(self, large):
                raise InputError(
                    f"{small}={getattr(self, small)} is more than {large}={getattr(self, large)}, so that such a request would never be taken; "
                    f"lower {small} or raise {large}"
                )
