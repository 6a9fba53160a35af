from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PageShape(_message.Message):
    __slots__ = ("layers", "kv_heads", "tokens", "head_dim", "dtype")
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    layers: int
    kv_heads: int
    tokens: int
    head_dim: int
    dtype: str
    def __init__(self, layers: _Optional[int] = ..., kv_heads: _Optional[int] = ..., tokens: _Optional[int] = ..., head_dim: _Optional[int] = ..., dtype: _Optional[str] = ...) -> None: ...

class PageChunk(_message.Message):
    __slots__ = ("page_id", "shape", "data", "last", "missing", "model", "mac")
    PAGE_ID_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MAC_FIELD_NUMBER: _ClassVar[int]
    page_id: bytes
    shape: PageShape
    data: bytes
    last: bool
    missing: bool
    model: bytes
    mac: bytes
    def __init__(self, page_id: _Optional[bytes] = ..., shape: _Optional[_Union[PageShape, _Mapping]] = ..., data: _Optional[bytes] = ..., last: _Optional[bool] = ..., missing: _Optional[bool] = ..., model: _Optional[bytes] = ..., mac: _Optional[bytes] = ...) -> None: ...

class PutRequest(_message.Message):
    __slots__ = ("chunk", "holder")
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    HOLDER_FIELD_NUMBER: _ClassVar[int]
    chunk: PageChunk
    holder: str
    def __init__(self, chunk: _Optional[_Union[PageChunk, _Mapping]] = ..., holder: _Optional[str] = ...) -> None: ...

class PutReply(_message.Message):
    __slots__ = ("pages_stored", "pages_known")
    PAGES_STORED_FIELD_NUMBER: _ClassVar[int]
    PAGES_KNOWN_FIELD_NUMBER: _ClassVar[int]
    pages_stored: int
    pages_known: int
    def __init__(self, pages_stored: _Optional[int] = ..., pages_known: _Optional[int] = ...) -> None: ...

class PutCodecRequest(_message.Message):
    __slots__ = ("codec_id", "tables")
    CODEC_ID_FIELD_NUMBER: _ClassVar[int]
    TABLES_FIELD_NUMBER: _ClassVar[int]
    codec_id: bytes
    tables: bytes
    def __init__(self, codec_id: _Optional[bytes] = ..., tables: _Optional[bytes] = ...) -> None: ...

class PutCodecReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class MatchRequest(_message.Message):
    __slots__ = ("page_ids",)
    PAGE_IDS_FIELD_NUMBER: _ClassVar[int]
    page_ids: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, page_ids: _Optional[_Iterable[bytes]] = ...) -> None: ...

class MatchReply(_message.Message):
    __slots__ = ("pages",)
    PAGES_FIELD_NUMBER: _ClassVar[int]
    pages: int
    def __init__(self, pages: _Optional[int] = ...) -> None: ...

class FetchRequest(_message.Message):
    __slots__ = ("page_ids", "holder")
    PAGE_IDS_FIELD_NUMBER: _ClassVar[int]
    HOLDER_FIELD_NUMBER: _ClassVar[int]
    page_ids: _containers.RepeatedScalarFieldContainer[bytes]
    holder: str
    def __init__(self, page_ids: _Optional[_Iterable[bytes]] = ..., holder: _Optional[str] = ...) -> None: ...

class FetchReply(_message.Message):
    __slots__ = ("chunk",)
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    chunk: PageChunk
    def __init__(self, chunk: _Optional[_Union[PageChunk, _Mapping]] = ...) -> None: ...

class RequantizeRequest(_message.Message):
    __slots__ = ("codec_id", "shape", "page_ids", "layer", "head", "position", "side", "have", "want", "meta")
    class PageIdsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: bytes
        def __init__(self, key: _Optional[int] = ..., value: _Optional[bytes] = ...) -> None: ...
    CODEC_ID_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    PAGE_IDS_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    SIDE_FIELD_NUMBER: _ClassVar[int]
    HAVE_FIELD_NUMBER: _ClassVar[int]
    WANT_FIELD_NUMBER: _ClassVar[int]
    META_FIELD_NUMBER: _ClassVar[int]
    codec_id: bytes
    shape: PageShape
    page_ids: _containers.ScalarMap[int, bytes]
    layer: bytes
    head: bytes
    position: bytes
    side: bytes
    have: bytes
    want: bytes
    meta: bytes
    def __init__(self, codec_id: _Optional[bytes] = ..., shape: _Optional[_Union[PageShape, _Mapping]] = ..., page_ids: _Optional[_Mapping[int, bytes]] = ..., layer: _Optional[bytes] = ..., head: _Optional[bytes] = ..., position: _Optional[bytes] = ..., side: _Optional[bytes] = ..., have: _Optional[bytes] = ..., want: _Optional[bytes] = ..., meta: _Optional[bytes] = ...) -> None: ...

class RequantizeReply(_message.Message):
    __slots__ = ("found", "planes")
    FOUND_FIELD_NUMBER: _ClassVar[int]
    PLANES_FIELD_NUMBER: _ClassVar[int]
    found: bytes
    planes: bytes
    def __init__(self, found: _Optional[bytes] = ..., planes: _Optional[bytes] = ...) -> None: ...

class TouchRequest(_message.Message):
    __slots__ = ("page_ids", "holder")
    PAGE_IDS_FIELD_NUMBER: _ClassVar[int]
    HOLDER_FIELD_NUMBER: _ClassVar[int]
    page_ids: _containers.RepeatedScalarFieldContainer[bytes]
    holder: str
    def __init__(self, page_ids: _Optional[_Iterable[bytes]] = ..., holder: _Optional[str] = ...) -> None: ...

class TouchReply(_message.Message):
    __slots__ = ("pages",)
    PAGES_FIELD_NUMBER: _ClassVar[int]
    pages: int
    def __init__(self, pages: _Optional[int] = ...) -> None: ...

class ReleaseRequest(_message.Message):
    __slots__ = ("page_ids", "holder")
    PAGE_IDS_FIELD_NUMBER: _ClassVar[int]
    HOLDER_FIELD_NUMBER: _ClassVar[int]
    page_ids: _containers.RepeatedScalarFieldContainer[bytes]
    holder: str
    def __init__(self, page_ids: _Optional[_Iterable[bytes]] = ..., holder: _Optional[str] = ...) -> None: ...

class ReleaseReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatsReply(_message.Message):
    __slots__ = ("pages", "bytes", "rows_requantized", "rows_missing", "redis_row_reads", "requantize_bytes", "stored_bytes", "budget_bytes", "evicted", "refused")
    PAGES_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    ROWS_REQUANTIZED_FIELD_NUMBER: _ClassVar[int]
    ROWS_MISSING_FIELD_NUMBER: _ClassVar[int]
    REDIS_ROW_READS_FIELD_NUMBER: _ClassVar[int]
    REQUANTIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    STORED_BYTES_FIELD_NUMBER: _ClassVar[int]
    BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    EVICTED_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    pages: int
    bytes: int
    rows_requantized: int
    rows_missing: int
    redis_row_reads: int
    requantize_bytes: int
    stored_bytes: int
    budget_bytes: int
    evicted: int
    refused: int
    def __init__(self, pages: _Optional[int] = ..., bytes: _Optional[int] = ..., rows_requantized: _Optional[int] = ..., rows_missing: _Optional[int] = ..., redis_row_reads: _Optional[int] = ..., requantize_bytes: _Optional[int] = ..., stored_bytes: _Optional[int] = ..., budget_bytes: _Optional[int] = ..., evicted: _Optional[int] = ..., refused: _Optional[int] = ...) -> None: ...
