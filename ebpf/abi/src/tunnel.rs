//! The tunnels between nodes, whose own packets are no Service's.

use core::mem::{offset_of, size_of};

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::sizes::TUNNELS;
use crate::{Address, Port};

/// UDP port of the tunnels, those of the kernel's VXLAN (RFC 7348's 4789 is left to others on the node).
pub const TUNNEL_PORT: Port = Port::new(8_472);

/// The ends of a tunnel. It stands at the [place](Self::place) that its peer's address gives, so that a program finds it by an index;
/// of two peers with one place one has none, and the programs ask about its packets as about anybody's.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Tunnel {
    /// This node's end.
    pub own: Address,
    /// The other node's.
    pub peer: Address,
}
const _: () = assert!(size_of::<Tunnel>() == 32 && offset_of!(Tunnel, peer) == 16);

impl Tunnel {
    /// Where it stands. Neighbours of a network of that many addresses have a place each.
    #[inline(always)]
    #[must_use]
    pub const fn place(peer: &Address) -> u32 {
        let low = u32::from_be(peer.words()[3]);
        (low ^ (low >> TUNNELS.trailing_zeros())) & (TUNNELS - 1)
    }
}
const _: () = assert!(TUNNELS.is_power_of_two());

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_have_a_place_each() {
        let mut places = [false; TUNNELS as usize];
        for n in 0..TUNNELS {
            let [_, _, c, d] = n.to_be_bytes();
            let peer = Address::v4([10, 44, 64 + c, d]);
            let place = Tunnel::place(&peer) as usize;
            assert!(!core::mem::replace(&mut places[place], true), "{peer:?}");
        }
    }
}
