"""What every kind of thing in the bound has to hold. A test class of a new one inherits the tests by a mixin."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracles import BATCH, batch, examples, inner, matrix_of, norm_of

from local_bound import LinearOperator, check_operator

# The tests stand in the mixin and run in every class that inherits them.
shared_examples = settings(examples, suppress_health_check=[HealthCheck.differing_executors])


class OperatorContract:
    """What every linear operator holds. A subclass gives `create`.

    create(draw): a small random operator in float64; draw: of hypothesis, draws from a strategy.
    """

    def create(self, draw):
        raise NotImplementedError

    @shared_examples
    @given(st.data())
    def test_checks_find_nothing_wrong(self, data):
        check_operator(self.create(data.draw))

    @shared_examples
    @given(st.data())
    def test_no_sum_has_more_terms_than_it_says(self, data):
        operator = self.create(data.draw)
        for operator_terms, dim in zip(operator.terms, (1, 0)):
            assert (matrix_of(operator) != 0).sum(dim=dim).max() <= operator_terms

    @shared_examples
    @given(st.data())
    def test_the_bound_on_its_norm_is_not_below_the_norm(self, data):
        operator = self.create(data.draw)
        norm = norm_of(matrix_of(operator))
        assert norm <= operator.norm_bound() * (1 + 1e-12)
        assert norm <= LinearOperator.norm_bound(operator) * (1 + 1e-12)  # by sums of absolute values

    @shared_examples
    @given(st.data())
    def test_shapes_are_those_of_the_layer(self, data):
        operator = self.create(data.draw)
        x, y = batch(operator.input_shape), batch(operator.output_shape)
        for forward in (operator.apply, operator.affine, operator.absolute):
            assert forward(x).shape == (BATCH, *operator.output_shape)
        assert operator.adjoint(y).shape == x.shape
        assert operator.weight_gradient(x, y).shape == operator.weight.shape

    @shared_examples
    @given(st.data())
    def test_adjoint_is_the_adjoint_of_apply(self, data):
        operator = self.create(data.draw)
        x, y = batch(operator.input_shape), batch(operator.output_shape)
        torch.testing.assert_close(inner(y, operator.apply(x)), inner(operator.adjoint(y), x))

    @shared_examples
    @given(st.data())
    def test_apply_is_linear(self, data):
        operator = self.create(data.draw)
        x, y = batch(operator.input_shape), batch(operator.input_shape)
        torch.testing.assert_close(operator.apply(2 * x - y), 2 * operator.apply(x) - operator.apply(y))

    @shared_examples
    @given(st.data())
    def test_affine_is_the_linear_part_and_the_bias(self, data):
        operator = self.create(data.draw)
        x = batch(operator.input_shape)
        affine, linear = operator.affine(x), operator.apply(x)
        torch.testing.assert_close(affine - linear, operator.affine(torch.zeros_like(x)))
        if operator.bias is None:
            assert torch.equal(affine, linear)
        else:
            bias = operator.bias.view(-1, *[1] * (len(operator.output_shape) - 1))
            torch.testing.assert_close(affine, linear + bias)

    @shared_examples
    @given(st.data())
    def test_absolute_takes_every_entry_of_the_matrix_absolute(self, data):
        operator = self.create(data.draw)
        x, entries = batch(operator.input_shape), operator.absolute_operator()
        expected = x.flatten(1) @ matrix_of(operator).abs().T
        torch.testing.assert_close(operator.absolute(x).flatten(1), expected)
        torch.testing.assert_close(entries.apply(x).flatten(1), expected)
        assert entries.bias is None

    @shared_examples
    @given(st.data())
    def test_row_norms_are_never_below_the_true_ones(self, data):
        operator = self.create(data.draw)
        true = matrix_of(operator).norm(dim=1).view(operator.output_shape)
        assert (operator.row_norms() >= true * (1 - 1e-12)).all()

    @shared_examples
    @given(st.data())
    def test_weight_gradient_is_what_differences_of_the_weight_show(self, data):
        operator = self.create(data.draw)
        x, y = batch(operator.input_shape), batch(operator.output_shape)
        step = torch.randn_like(operator.weight)
        # The product is linear in the weight, so that a step of any length will do.
        ends = [inner(y, operator.with_weight(operator.weight + sign * step).apply(x)).sum() for sign in (1, -1)]
        found = (operator.weight_gradient(x, y) * step).sum()
        torch.testing.assert_close(found, (ends[0] - ends[1]) / 2, atol=1e-9, rtol=1e-9)

    @shared_examples
    @given(st.data())
    def test_rescaled_scales_and_shifts_the_channels(self, data):
        operator = self.create(data.draw)
        scale, shift = torch.randn(2, operator.output_shape[0], dtype=torch.float64)
        channels = (-1, *[1] * (len(operator.output_shape) - 1))
        x = batch(operator.input_shape)
        rescaled = operator.rescaled(scale, shift)
        expected = operator.affine(x) * scale.view(channels) + shift.view(channels)
        torch.testing.assert_close(rescaled.affine(x), expected)
        torch.testing.assert_close(rescaled.apply(x), operator.apply(x) * scale.view(channels))

    @shared_examples
    @given(st.data())
    def test_rescaled_says_how_large_the_terms_of_its_bias_are(self, data):
        operator = self.create(data.draw)
        scale, shift = torch.randn(2, operator.output_shape[0], dtype=torch.float64)
        own = 0 if operator.bias is None else (operator.bias * scale).abs()
        torch.testing.assert_close(operator.rescaled(scale, shift).bias_size, own + shift.abs())
        given_size = operator.rescaled(scale, shift, 3 * shift.abs()).bias_size
        torch.testing.assert_close(given_size, own + 3 * shift.abs())

    @pytest.mark.parametrize("size", [1e-300, 1e-30, 1.0, 1e30, 1e300])
    @shared_examples
    @given(data=st.data())
    def test_scaled_is_exact_and_its_norm_times_the_scale_is_the_norm(self, size, data):
        operator = self.create(data.draw)
        operator = operator.with_weight(operator.weight * size, operator.bias)
        scaled, scale = operator.scaled, operator.scale
        assert torch.frexp(scale).mantissa == 0.5  # a power of two
        assert torch.equal(scaled.weight * scale, operator.weight)
        assert 0.5 <= scaled.weight.abs().max() < 1
        assert scaled.bias is None
        torch.testing.assert_close(norm_of(matrix_of(scaled)) * (scale / size), norm_of(matrix_of(operator) / size))

    @shared_examples
    @given(st.data())
    def test_scaled_has_no_gradient(self, data):
        operator = self.create(data.draw)
        operator = operator.with_weight(operator.weight.requires_grad_())
        assert not operator.scaled.weight.requires_grad
        assert not operator.scale.requires_grad

    @shared_examples
    @given(st.data())
    def test_a_zero_operator_has_a_scale_too(self, data):
        operator = self.create(data.draw)
        zero = operator.with_weight(torch.zeros_like(operator.weight))
        assert zero.scale == 1
        assert not zero.scaled.weight.any()
        assert not zero.row_norms().any()

    @shared_examples
    @given(st.data())
    def test_with_weight_keeps_the_geometry_and_forgets_what_was_known_of_the_weight(self, data):
        operator = self.create(data.draw)
        x, before = batch(operator.input_shape), operator.scale
        eight_times = operator.with_weight(8 * operator.weight)
        torch.testing.assert_close(eight_times.apply(x), 8 * operator.apply(x))
        assert eight_times.scale == 8 * before
        assert torch.equal(eight_times.scaled.weight, operator.scaled.weight)
        assert eight_times.geometry() == operator.geometry()
        assert eight_times.position == operator.position
        assert eight_times.bias is None
        assert eight_times.bias_size is None
        assert operator.scale == before

    @shared_examples
    @given(st.data())
    def test_no_product_changes_what_it_is_given(self, data):
        operator = self.create(data.draw)
        x, y = batch(operator.input_shape), batch(operator.output_shape)
        kept = [tensor.clone() for tensor in (x, y, operator.weight)]
        for product in (operator.apply, operator.affine, operator.absolute):
            product(x)
        operator.adjoint(y)
        operator.weight_gradient(x, y)
        assert all(torch.equal(*pair) for pair in zip(kept, (x, y, operator.weight)))
