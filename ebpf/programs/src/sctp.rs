//! SCTP's ports and checksum. Its packets are rewritten by the kernel's helpers, whatever shape they have.

use aya_ebpf::bindings::BPF_F_RECOMPUTE_CSUM;
use aya_ebpf::programs::TcContext;
use weft_ebpf_abi::FlowValue;
use weft_ebpf_logic::packet::{Packet, Part};
use weft_ebpf_logic::sctp::{CHECKSUM, change_of_checksum};

use crate::rewrite::ports;

/// A sum of the whole packet that a device has made follows.
const RECOMPUTE: u64 = BPF_F_RECOMPUTE_CSUM as u64;

/// Sets the ports, and changes the checksum accordingly; addresses are none of it. One that is 0 is left to a device, which makes it of all
/// that is there and takes it for 0 before. (Of finished ones 1 in 2^32 is 0. Its packet is dropped by who gets it, and sent again.)
#[inline(never)]
pub fn rewrite(ctx: &TcContext, packet: &Packet, entry: &FlowValue) -> Option<()> {
    let (key, transport) = (&packet.key, packet.transport());
    let old = ports(key.source_port, key.destination_port);
    let new = ports(entry.source_port, entry.destination_port);
    if old == new {
        return Some(());
    }
    // How much follows a first fragment is not known.
    if !matches!(packet.part, Part::Whole) {
        return None;
    }
    let checksum: [u8; 4] = ctx.load(transport + CHECKSUM).ok()?;
    let checksum = u32::from_le_bytes(checksum);
    if checksum != 0 {
        let change = u32::from_le_bytes(old) ^ u32::from_le_bytes(new);
        let bytes = packet.total_bytes.wrapping_sub(packet.header_bytes) as u16;
        let checksum = (checksum ^ change_of_checksum(change, bytes)).to_le_bytes();
        ctx.store(transport + CHECKSUM, &checksum, RECOMPUTE).ok()?;
    }
    ctx.store(transport, &new, RECOMPUTE).ok()
}
