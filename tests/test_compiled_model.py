"""A whole model under torch.compile, forward and backward."""

import pytest
import torch
from test_lora import adapted_model
from whole_model import HEADS, gradients_of, loss_of, make_batch, make_model

from nvembed_fast import ops


@pytest.mark.slow
@pytest.mark.parametrize("head", (HEADS[0], HEADS[1], HEADS[4]), ids=lambda h: h[1] or h[0])
def test_compiles_as_one_graph_for_all_lengths(head, device):
    torch._dynamo.reset()
    graphs = []

    def count(graph, examples):
        graphs.append(graph)
        return aot_eager(graph, examples)

    aot_eager = torch._dynamo.lookup_backend("aot_eager")
    model = make_model(head, device, layers=1)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=count)
    for seed, lengths in enumerate(((9, 1, 17), (3, 4), (8, 8, 2), (5, 2))):
        batch = make_batch(device, lengths, seed)
        wanted = gradients_of(model, batch, "triton")
        with ops.use_impl("triton"):
            model.zero_grad()
            loss_of(compiled, batch).backward()
        for name, parameter in model.named_parameters():
            # the compiler may reorder what stands between the kernels
            torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=1e-6)
        if seed == 1:
            settled = len(graphs)
    assert len(graphs) == settled, f"{len(graphs) - settled} recompilations for other lengths"


@pytest.mark.slow
def test_adapters_compile_as_one_graph(device):
    torch._dynamo.reset()
    model, batch = adapted_model(layers=1).to(device), make_batch(device)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    with ops.use_impl("torch"):
        wanted = {name: g.clone() for name, g in gradients_of(model, batch, "torch").items()}
        model.zero_grad()
        loss_of(compiled, batch).backward()
    for name, gradient in wanted.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-4, atol=1e-6, msg=name)
