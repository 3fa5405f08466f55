"""What is read out of assembly, on texts short enough to count by hand."""

import pytest
from megatsp_kernels.assembly import count, has_system_scope
from megatsp_kernels.chips import CHIPS, occupancy

AMD = """
	.text
kernel:                                 ; @kernel
	buffer_load_dwordx4 v[0:3], v8, s[4:7], 0 offen
	global_load_dword v4, v[8:9], off
	v_mfma_f32_16x16x16_bf16 a[0:3], v[0:1], v[2:3], a[0:3]
.LBB0_1:                                ; the loop
	global_load_dwordx4 v[0:3], v[8:9], off
	buffer_load_ushort v4, v8, s[4:7], 0 offen
	v_mfma_f32_32x32x8_bf16 a[0:15], v[0:1], v[2:3], a[0:15]
	v_mfma_f32_4x4x4_16b_f16 a[0:3], v[0:1], v[2:3], a[0:3]
	s_cbranch_scc1 .LBB0_1
	ds_read_b128 v[0:3], v4             ; LDS: no device memory
	global_store_dwordx2 v[8:9], v[0:1], off
	global_atomic_add v4, v[8:9], v5, off sc0
	buffer_atomic_pk_add_bf16 v4, v8, s[4:7], 0 offen
	; buffer_inv sc0 sc1 in a comment
"""
PTX = """
	// wgmma.mma_async in a comment
	.param .b64 kernel_param_0
	@%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
	mov.b32 %r9, 0;
$L__BB0_2:
	cp.async.cg.shared.global [ %r5 + 0 ], [ %rd3 + 0 ], 0x10, %r7;
	ld.global.L1::evict_last.b16 { %rs1 }, [ %rd2 + 0 ];
	wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%r1}, %rd4, %rd5, 1, 1, 1, 0, 0;
	mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 { %r1 }, { %r2 }, { %r3 }, { %r4 };
	@%p2 bra 	$L__BB0_2;
	ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [%r5];
	st.global.v2.b64 [ %rd4 + 0 ], { %rd5, %rd6 };
	st.global.b32 [ %rd4 + 0 ], { %r5 };
	atom.global.gpu.acq_rel.add.u32 %r8, [ %rd5 + 0 ], 1;
	red.global.gpu.relaxed.add.f32 [ %rd5 + 0 ], %f1;
"""


def test_amd_assembly_is_counted():
    found = count(AMD, "gfx942")
    assert found.matrix == {
        "v_mfma_f32_16x16x16_bf16": 1,
        "v_mfma_f32_32x32x8_bf16": 1,
        "v_mfma_f32_4x4x4_16b_f16": 1,
    }
    assert (found.loads, found.wide_loads, found.stores, found.wide_stores) == (4, 2, 1, 0)
    assert (found.atomics, found.float_atomics) == (2, 1)
    assert found.system_acquires + found.system_releases == 0
    # The loop's alone: 32 x 32 x 8 and 16 blocks of 4 x 4 x 4; 16 and 2 bytes a lane.
    assert found.loop_flops == 2 * 32 * 32 * 8 + 2 * 16 * 4 * 4 * 4
    assert found.loop_bytes == 64 * 18
    assert found.intensity == pytest.approx(18432 / 1152)


def test_ptx_is_counted():
    found = count(PTX, "sm_90")
    assert {name.split(".")[0]: times for name, times in found.matrix.items()} == {"wgmma": 1, "mma": 1}
    assert (found.loads, found.wide_loads, found.stores, found.wide_stores) == (3, 2, 2, 1)
    assert (found.atomics, found.float_atomics) == (2, 1)
    assert found.loop_flops == 2 * 64 * 128 * 16 // 4 + 2 * 16 * 8 * 16  # four warps share a wgmma
    assert found.loop_bytes == 32 * 18


def test_without_products_there_is_no_intensity():
    assert count("\tglobal_load_dword v4, v[8:9], off\n", "gfx942").intensity is None


@pytest.mark.parametrize(
    ("target", "line", "acquires", "releases"),
    [
        ("gfx942", "buffer_inv sc0 sc1", 1, 0),
        ("gfx950", "buffer_wbl2 sc0 sc1", 0, 1),
        ("gfx942", "buffer_inv sc1", 0, 0),
        ("gfx942", "buffer_wbl2 sc1", 0, 0),
        ("gfx942", "global_atomic_add v1, v1, v1, s[2:3] sc0 sc1", 0, 0),
        ("sm_90", "@%p2 ld.global.sys.acquire.b32 %r4, [ %rd2 + 0 ];", 1, 0),
        ("sm_90", "ld.acquire.sys.global.u32 %r4, [%rd2];", 1, 0),
        ("sm_90", "st.release.sys.global.u32 [%rd2], %r4;", 0, 1),
        ("sm_90", "@%p2 atom.global.sys.release.exch.b32 %r10, [ %rd5 + 0 ], %r13;", 0, 1),
        ("sm_90", "atom.global.acq_rel.sys.cas.b32 %r10, [ %rd5 ], %r1, %r2;", 1, 1),
        ("sm_90", "fence.acq_rel.sys;", 1, 1),
        ("sm_90", "fence.sc.sys;", 1, 1),
        ("sm_90", "ld.global.sys.relaxed.b32 %r4, [ %rd2 + 0 ];", 0, 0),
        ("sm_90", "ld.global.gpu.acquire.b32 %r4, [ %rd2 + 0 ];", 0, 0),
        ("sm_90", "fence.acq_rel.gpu;", 0, 0),
    ],
)
def test_only_system_scope_counts_as_such(target, line, acquires, releases):
    found = count(f"\t{line}\n", target)
    assert (found.system_acquires, found.system_releases) == (acquires, releases)
    assert has_system_scope(f"\t{line}\n", target) == bool(acquires and releases)


@pytest.mark.parametrize(
    ("target", "num_warps", "registers", "shared_bytes", "groups", "limited_by"),
    [
        # AMD: LLVM's own estimate ("; Occupancy: 3") for these counts of registers, waves a SIMD.
        ("gfx942", 4, 156, 0, 3, "registers"),
        ("gfx942", 4, 208, 0, 2, "registers"),
        ("gfx942", 8, 256, 65536, 1, "registers"),
        ("gfx942", 4, 34, 0, 8, "warps"),
        ("gfx942", 4, 64, 32768, 2, "shared memory"),
        ("gfx950", 4, 64, 81920, 2, "shared memory"),
        ("gfx942", 2, 32, 0, 16, "groups"),
        ("gfx942", 1, 32, 0, 32, "groups"),
        # NVIDIA: 65,536 / (192 * 128) = 2.7 blocks; 228 KiB / (100 + 1) = 2.2; 64 warps / 4.
        ("sm_90", 4, 192, 0, 2, "registers"),
        ("sm_90", 4, 32, 102400, 2, "shared memory"),
        ("sm_90", 4, 32, 0, 16, "warps"),
        ("sm_90", 1, 32, 0, 32, "groups"),
        ("sm_90", 8, 64, 400000, 0, "shared memory"),
    ],
)
def test_occupancy(target, num_warps, registers, shared_bytes, groups, limited_by):
    found = occupancy(CHIPS[target], num_warps, registers, shared_bytes)
    assert (found.groups, found.limited_by) == (groups, limited_by)
    assert found.warps == groups * num_warps <= found.warps_limit


def test_a_way_out_that_was_moved_before_its_loop_is_no_loop():
    text = """
.LBB0_5:
	s_branch .LBB0_9
.LBB0_6:
	buffer_load_dwordx4 v[0:3], v8, s[4:7], 0 offen
	v_mfma_f32_16x16x16_bf16 a[0:3], v[0:1], v[2:3], a[0:3]
	s_cbranch_execz .LBB0_5
	v_mfma_f32_16x16x16_bf16 a[0:3], v[0:1], v[2:3], a[0:3]
	s_branch .LBB0_6
.LBB0_9:
"""
    found = count(
        text.replace("_5:\n", "_5:\n\tv_mfma_f32_4x4x4_16b_f16 a[0:3], v[0:1], v[2:3], a[0:3]\n"), "gfx942"
    )
    assert found.loop_flops == 2 * 2 * 16**3
