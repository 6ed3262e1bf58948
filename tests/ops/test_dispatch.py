import subprocess
import sys

import pytest

from thrifty import native

RUN = """
import os, torch
from thrifty import native, ops
x, y = torch.randn(2, 300, 64)
torch.randn(500, 500) @ torch.randn(500, 500)
expected = ops.product_key_topk(x, y, 32)[1]
for threads in (1, 3, torch.get_num_threads()):
    torch.set_num_threads(threads)
    assert torch.equal(ops.product_key_topk(x, y, 32)[1], expected)
native.use_openmp(None)
assert torch.equal(ops.product_key_topk(x, y, 32)[1], expected)
"""
FORK = """
import os, torch
from thrifty import ops
x, y = torch.randn(2, 300, 64)
expected = ops.product_key_topk(x, y, 32)[1]
child = os.fork()
ok = all(torch.equal(ops.product_key_topk(x, y, 32)[1], expected) for _ in range(20))
if child == 0:
    os._exit(0 if ok else 1)
assert ok and os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


@pytest.mark.skipif(not native.available(), reason="there is no native library")
def test_results_do_not_depend_on_whose_threads_compute_them():
    subprocess.run([sys.executable, "-W", "ignore", "-c", RUN], check=True, timeout=60)


@pytest.mark.skipif(sys.platform != "linux", reason="torch's threads are shared on Linux")
def test_a_child_of_fork_has_threads_of_its_own():
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORK], check=True, timeout=60)
