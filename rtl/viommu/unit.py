"""virtio-iommu as one back end: requests, mappings, translation, events."""

from amaranth import Cat, Const, Module, Mux, ResetInserter, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from ..dma.layouts import ChainBeat
from ..iommu.layouts import TranslateRequest, TranslateResponse
from ..spec import virtio_iommu as spec
from ..virtio.layouts import Chain
from .device import IommuDevice
from .events import Events
from .intervals import Intervals
from .requests import Requests
from .translator import FRAME_BITS, Translator

REQUESTS, EVENTS = 0, 1  # queues [VIRTIO1.4 5.13.2]
