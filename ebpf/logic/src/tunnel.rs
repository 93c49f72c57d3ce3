//! Which packets are those of a tunnel to another node: nobody's, and known for it without a look at flows and Services.
//!
//! Both ends are looked at, not the port alone: a Service may have that port too.

use weft_ebpf_abi::{Address, FlowKey, Port, TUNNEL_PORT, Tunnel, UDP};

/// The tunnels of the node.
pub trait Tunnels {
    /// What stands at a place.
    fn tunnel(&self, place: u32) -> Option<&Tunnel>;
}

/// Whether a packet that comes in is a peer's.
#[inline(always)]
pub fn comes_in<T: Tunnels>(tunnels: &T, key: &FlowKey) -> bool {
    has_port(key) && is_between(tunnels, &key.destination, &key.source)
}

/// Whether a packet that goes out is for a peer.
#[inline(always)]
pub fn goes_out<T: Tunnels>(tunnels: &T, key: &FlowKey) -> bool {
    has_port(key) && is_between(tunnels, &key.source, &key.destination)
}

/// Whether it has the port, without which it is none.
#[inline(always)]
#[must_use]
pub fn has_port(key: &FlowKey) -> bool {
    is_port(key.protocol, key.destination_port)
}

/// Whether it is the port of tunnels.
#[inline(always)]
#[must_use]
pub fn is_port(protocol: u8, port: Port) -> bool {
    port == TUNNEL_PORT && protocol == UDP
}

#[inline(always)]
fn is_between<T: Tunnels>(tunnels: &T, own: &Address, peer: &Address) -> bool {
    match tunnels.tunnel(Tunnel::place(peer)) {
        Some(tunnel) => is(&tunnel.peer, peer) && is(&tunnel.own, own),
        None => false,
    }
}

/// By words: a comparison of bytes is a loop of them in a BPF program.
#[inline(always)]
const fn is(one: &Address, other: &Address) -> bool {
    let ([a, b, c, d], [e, f, g, h]) = (one.words(), other.words());
    (a ^ e) | (b ^ f) | (c ^ g) | (d ^ h) == 0
}

#[cfg(test)]
mod tests {
    use core::cell::Cell;

    use super::*;
    use weft_ebpf_abi::TCP;

    /// One tunnel, and how often a table was asked.
    struct One(Tunnel, Cell<u32>);

    impl Tunnels for One {
        fn tunnel(&self, place: u32) -> Option<&Tunnel> {
            self.1.set(self.1.get() + 1);
            (place == Tunnel::place(&self.0.peer)).then_some(&self.0)
        }
    }

    fn key(protocol: u8, source: Address, (destination, port): (Address, u16)) -> FlowKey {
        let source_port = Port::new(40_000);
        FlowKey { source, destination, source_port, destination_port: Port::new(port), protocol, pad: [0; 3] }
    }

    #[test]
    fn a_tunnel_is_known_by_both_ends_and_the_port() {
        let port = TUNNEL_PORT.get();
        for (own, peer, stranger) in [
            (Address::v4([10, 44, 0, 2]), Address::v4([10, 44, 0, 3]), Address::v4([10, 44, 0, 4])),
            (Address([1; 16]), Address([2; 16]), Address([3; 16])),
        ] {
            // At the peer's place, but not the peer.
            let mut alike = peer.words();
            alike[0] ^= 1;
            let alike = Address::from_words(alike);
            assert_eq!(Tunnel::place(&alike), Tunnel::place(&peer));
            let one = One(Tunnel { own, peer }, Cell::new(0));
            let rows = [
                ("a peer's", key(UDP, peer, (own, port)), true, false, 1),
                ("for a peer", key(UDP, own, (peer, port)), false, true, 1),
                ("a stranger's", key(UDP, stranger, (own, port)), false, false, 1),
                ("of who has its place", key(UDP, alike, (own, port)), false, false, 1),
                ("from a peer to another address", key(UDP, peer, (stranger, port)), false, false, 1),
                ("another port", key(UDP, peer, (own, 53)), false, false, 0),
                ("another protocol", key(TCP, peer, (own, port)), false, false, 0),
            ];
            for (name, key, inwards, outwards, lookups) in rows {
                assert_eq!(comes_in(&one, &key), inwards, "{name}");
                assert_eq!(one.1.take(), lookups, "what {name} costs, coming in");
                assert_eq!(goes_out(&one, &key), outwards, "{name}");
                assert_eq!(one.1.take(), lookups, "what {name} costs, going out");
            }
        }
    }
}
