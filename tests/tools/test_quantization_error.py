"""The tool that says what narrow storage costs: wider is nearer to float32, and bytes are those of packed kernels."""

from tools.quantization_error import errors


def test_the_wider_the_storage_the_smaller_the_error_and_the_larger_the_kernels(small_world):
    rows = errors(small_world.llm)
    assert [row["storage"] for row in rows] == ["float32", "bfloat16", "int8", "int4"]
    assert rows[0]["error"] == 0 and rows[0]["same_token"] == 1
    assert 0 < rows[1]["error"] < 0.01 < rows[3]["error"] < 0.5
    assert rows[1]["error"] < rows[2]["error"] < rows[3]["error"]
    sizes = [row["bytes"] for row in rows]
    assert sizes == sorted(sizes, reverse=True) and sizes[1] * 2 == sizes[0]
