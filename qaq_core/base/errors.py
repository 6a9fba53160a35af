"""One exception tree for everything that `qaq_core` raises on purpose."""


class QAQError(Exception):
    """Base of all errors raised by QAQ."""


class UnsupportedModelError(QAQError):
    """The model's attention cannot be served from a quantized cache; the message says why."""


class ModelLoadError(QAQError):
    """The model's files are missing, truncated or not a model; the message says what to do."""


class ConfigError(QAQError, ValueError):
    """A setting is out of range or contradicts another."""


class QuantizationError(QAQError, ValueError):
    """Rows cannot be quantized: NaN, infinite or beyond the codec's range. Names the layer."""


class KernelError(QAQError, RuntimeError):
    """The C++ library refused what it was given: a pointer, a size or an index that is none. It is a fault of QAQ."""


class OriginalsError(QAQError):
    """The originals store refused or failed; nothing that was not acknowledged is lost."""


class CorruptPageError(OriginalsError):
    """A stored page does not match its header or checksum."""
