"""Pages in host memory: their rows need no store, and they take no more than they may."""

from __future__ import annotations

from concurrent.futures import Future

import numpy as np
import pytest
import torch

from qaq_core.base.pages import Page, PageShape, unique_names
from qaq_core.base.rows import RowReply, RowRequest
from qaq_core.base.widths import HALF
from qaq_core.quantization.bit_planes import unpack_half
from qaq_core.quantization.codecs import GaussianCodec
from qaq_core.quantization.quantizer import Quantizer
from qaq_core.quantization.transforms import IdentityTransform
from qaq_core.storage.host_pages import HostPages
from qaq_core.storage.originals import InProcessOriginals
from qaq_core.storage.staging import Staging
from tests.core.rows import normal

SHAPE = PageShape(2, 2, 8, 16)


def page(number: int) -> Page:
    return Page(bytes([number]) * 32, SHAPE, normal(number, *SHAPE.dims))


def test_the_ones_used_longest_ago_go() -> None:
    pages = [page(number) for number in range(4)]
    ids = [one.id for one in pages]
    kept = HostPages(3 * SHAPE.nbytes)
    for one in pages[:3]:
        kept.add(one)
    kept.add(pages[0])
    assert kept.nbytes == 3 * SHAPE.nbytes
    assert kept.get([ids[1], ids[3]]) == {ids[1]: pages[1]}
    kept.add(pages[3])
    assert kept.get(ids).keys() == {ids[0], ids[1], ids[3]}
    kept.drop([ids[1], ids[2]])
    assert kept.nbytes == 2 * SHAPE.nbytes
    nothing = HostPages(0)
    nothing.add(pages[0])
    assert (nothing.nbytes, nothing.get(ids)) == (0, {})


class Counting(InProcessOriginals):
    """A store that counts the rows it is asked for."""

    rows = 0

    def requantize(self, request: RowRequest, quantizer: Quantizer) -> Future[RowReply]:
        self.rows += len(request)
        return super().requantize(request, quantizer)


@pytest.mark.parametrize(("pages_kept", "asked"), [(0, 4), (1, 2), (2, 0)])
def test_rows_of_kept_pages_need_no_store(pages_kept: int, asked: int) -> None:
    store, host = Counting(), HostPages(pages_kept * SHAPE.nbytes)
    first = Staging(SHAPE, store, unique_names(), host)
    whole = normal(1, 2, 2, 2, 16, 16)
    first.append(whole)
    subject = first.fork(unique_names())
    assert subject.nbytes == 0, "the store has both pages"
    quantizer = Quantizer(IdentityTransform(), GaussianCodec())
    position = np.array([3, 7, 8, 15], np.int32)
    numbers = torch.stack([whole[1, 0, 1, at] for at in position.tolist()])
    meta = quantizer.meta(numbers[None, None])[0, 0]
    zeros, ones = np.zeros(4, np.int16), np.ones(4, np.int16)
    request = RowRequest(
        SHAPE,
        subject.page_ids(position),
        layer=ones,
        head=ones,
        position=position,
        side=zeros.astype(np.uint8),
        have=zeros.astype(np.uint8),
        want=np.full(4, HALF, np.uint8),
        meta=meta.numpy(),
    )
    parts = subject.requantize(request, quantizer)
    assert store.rows == asked
    scale = quantizer.codec.affine(meta)[0]
    for index, future in parts:
        rows = unpack_half(torch.from_numpy(future.result(0).planes).view(len(index), -1))
        assert torch.allclose(rows * scale[index], numbers[index], atol=1e-2)
    assert sorted(np.concatenate([index for index, _ in parts]).tolist()) == [0, 1, 2, 3]
