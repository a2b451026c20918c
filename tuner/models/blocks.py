"""The parts of a layer, each weight declared once, and what one call needs.

A family chooses the parts (`decoder.Layer`) or subclasses one where its own
differs: fused projections override `_declare` and `_project`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from tuner import mesh
from tuner.models import attention, layers, linear, rope, weights


@dataclasses.dataclass(frozen=True)
class Call:
  """What all layers of one forward pass share.

  tables: (cos_BTH, sin_BTH) of each of the model's ropes.
  attend: (q_BTNH, k_BTKH, v_BTKH, look, sinks_N, layer, memory) ->
    (out_BTNH, memory); `layer` is the layer's number, traced.
  real_BT: which tokens are no padding; None: all. Routers count these.
  """

  tables: tuple
  attend: Callable
  real_BT: jax.Array | None = None


class Attention(nnx.Module):
  """Grouped-query attention with rotary positions, or none."""

  def __init__(self, config, layer):
    self._declare(config)
    self.config, self.rope = config, layer.rope
    self.look = attention.Look(
      config.attention_scale, layer.window, config.attention_cap
    )

  def _declare(self, config) -> None:
    w, name = weights.weight, 'self_attn.{}_proj.weight'.format
    self.q = w('DNH', hf=name('q'), layout='(NH)D')
    self.k = w('DKH', hf=name('k'), layout='(KH)D')
    self.v = w('DKH', hf=name('v'), layout='(KH)D')
    self.o = w('NHD', hf=name('o'), layout='D(NH)')
    bias = 'self_attn.{}_proj.bias'.format
    shapes = {'q': 'NH', 'k': 'KH', 'v': 'KH', 'o': 'D'}
    for part in config.attention_biases:
      dims = shapes[part]
      layout = f'({dims})' if len(dims) > 1 else dims
      declared = w(dims, hf=bias(part), layout=layout, init='zeros')
      setattr(self, f'{part}_bias', declared)
    if config.qk_norm == 'head':  # Each head's own channels.
      self.q_norm = w('H', hf='self_attn.q_norm.weight', init=config.norm.init)
      self.k_norm = w('H', hf='self_attn.k_norm.weight', init=config.norm.init)
    elif config.qk_norm == 'heads':  # All heads' channels as one.
      q, k = 'self_attn.q_norm.weight', 'self_attn.k_norm.weight'
      self.q_norm = w('NH', hf=q, layout='(NH)', init=config.norm.init)
      self.k_norm = w('KH', hf=k, layout='(KH)', init=config.norm.init)
    if config.sinks:
      self.sinks = w('N', hf='self_attn.sinks')

  def __call__(self, x_BTD, call: Call, layer, memory):
    q, k, v = self._project(x_BTD)
    if self.config.qk_norm:
      q, k = self._norm(q, self.q_norm[...]), self._norm(k, self.k_norm[...])
    if self.rope is not None:
      tables = call.tables[self.rope]
      q, k = rope.rotate(q, tables), rope.rotate(k, tables)
    sinks = self.sinks[...] if self.config.sinks else None
    out, memory = call.attend(q, k, v, self.look, sinks, layer, memory)
    out = linear.project('BTNH,NHD->BTD', out, self.o)
    return add_bias(self, 'o', out), memory

  def _project(self, x_BTD):
    """(q_BTNH, k_BTKH, v_BTKH) before norms and rotation."""
    q = linear.project('BTD,DNH->BTNH', x_BTD, self.q)
    k = linear.project('BTD,DKH->BTKH', x_BTD, self.k)
    v = linear.project('BTD,DKH->BTKH', x_BTD, self.v)
    return (
      add_bias(self, 'q', q),
      add_bias(self, 'k', k),
      add_bias(self, 'v', v),
    )

  def _norm(self, x_BTNH, scale):
    norm = self.config.norm
    if scale.ndim == 1:
      return layers.rms_norm(x_BTNH, scale, norm)
    flat = x_BTNH.reshape(*x_BTNH.shape[:2], -1)
    return layers.rms_norm(flat, scale.reshape(-1), norm).reshape(x_BTNH.shape)


class Mlp(nnx.Module):
  """A gated linear unit (Shazeer 2020): down(act(gate(x)) * up(x))."""

  def __init__(self, config, layer):
    del layer
    self._declare(config)
    self.activation = config.activation

  def _declare(self, config) -> None:
    w, name = weights.weight, 'mlp.{}_proj.weight'.format
    self.gate = w('DF', hf=name('gate'), layout='FD')
    self.up = w('DF', hf=name('up'), layout='FD')
    self.down = w('FD', hf=name('down'), layout='DF')
    if config.mlp_bias:
      bias = 'mlp.{}_proj.bias'.format
      self.gate_bias = w('F', hf=bias('gate'), init='zeros')
      self.up_bias = w('F', hf=bias('up'), init='zeros')
      self.down_bias = w('D', hf=bias('down'), init='zeros')

  def __call__(self, x_BTD, call: Call):
    """(out_BTD, None): a dense layer routes nothing."""
    del call
    gate, up = self._project(x_BTD)
    hidden = layers.ACTIVATIONS[self.activation](gate) * up
    out = linear.project('BTF,FD->BTD', hidden, self.down)
    return add_bias(self, 'down', out), None

  def _project(self, x_BTD):
    """(gate_BTF, up_BTF) before the activation."""
    gate = linear.project('BTD,DF->BTF', x_BTD, self.gate)
    up = linear.project('BTD,DF->BTF', x_BTD, self.up)
    return add_bias(self, 'gate', gate), add_bias(self, 'up', up)


class Block(nnx.Module):
  """x + attention(x), then x + mlp(x), each normed where the family says."""

  def __init__(self, config, layer):
    for place, hf in dataclasses.asdict(config.norms).items():
      if hf is not None:
        declared = weights.weight('D', hf=f'{hf}.weight', init=config.norm.init)
        setattr(self, f'{place}_norm', declared)
    self.attention = layer.attention(config, layer)
    self.mlp = layer.mlp(config, layer)
    self.config = config

  def __call__(self, x_BTD, call: Call, layer, memory):
    """(x_BTD, memory, what the mlp says of its routing)."""
    out = self._norm('attention', x_BTD)
    out, memory = self.attention(out, call, layer, memory)
    x_BTD = x_BTD + self._scaled(self._norm('attention_post', out))
    out, routed = self.mlp(self._norm('mlp', x_BTD), call)
    x_BTD = x_BTD + self._scaled(self._norm('mlp_post', out))
    return mesh.constrain(x_BTD, 'BTD'), memory, routed

  def _norm(self, place, x_BTD):
    """x normed, or x itself where the family has no norm."""
    scale: Any = getattr(self, f'{place}_norm', None)
    if scale is None:
      return x_BTD
    return layers.rms_norm(x_BTD, scale[...], self.config.norm)

  def _scaled(self, x_BTD):
    return layers.scaled(x_BTD, self.config.residual_scale)


def add_bias(module: nnx.Module, part: str, x: jax.Array) -> jax.Array:
  """x plus the module's bias `<part>_bias`, if it declares one."""
  bias: Any = getattr(module, f'{part}_bias', None)
  return x if bias is None else x + bias[...]
