//! Addresses and ports as they stand in maps.

use core::fmt;
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// An address of either family: IPv6, or IPv4 mapped into it (`::ffff:a.b.c.d`), in network order.
///
/// It stands at multiples of four bytes in every key and value, and says so: a BPF compiler reads what may be anywhere byte by
/// byte, and then keeps each byte in a register or a word of the stack.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(4))]
pub struct Address(pub [u8; 16]);

impl Address {
    /// The unspecified address of IPv6: any IPv6 address of the node.
    pub const ANY: Self = Self([0; 16]);
    /// The unspecified address of IPv4: any IPv4 address of the node.
    pub const ANY_V4: Self = Self::v4([0; 4]);

    /// An IPv4 address.
    #[inline(always)]
    #[must_use]
    pub const fn v4(octets: [u8; 4]) -> Self {
        let [a, b, c, d] = octets;
        Self([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d])
    }

    /// A number that is no address, for tables that are keyed by a client: 64 bits behind the discard prefix `100::/64`.
    #[inline(always)]
    #[must_use]
    pub const fn from_id(id: u64) -> Self {
        let [a, b, c, d, e, f, g, h] = id.to_be_bytes();
        Self([1, 0, 0, 0, 0, 0, 0, 0, a, b, c, d, e, f, g, h])
    }

    /// The IPv4 address, if it is one.
    #[inline(always)]
    #[must_use]
    pub const fn as_v4(&self) -> Option<[u8; 4]> {
        match self.0 {
            [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d] => Some([a, b, c, d]),
            _ => None,
        }
    }

    /// The unspecified address of the same family.
    #[inline(always)]
    #[must_use]
    pub const fn any_of_family(&self) -> Self {
        if self.as_v4().is_some() { Self::ANY_V4 } else { Self::ANY }
    }

    /// Its words, each in network order as it stands in memory.
    #[inline(always)]
    #[must_use]
    pub const fn words(&self) -> [u32; 4] {
        zerocopy::transmute!(*self)
    }

    /// From such words.
    #[inline(always)]
    #[must_use]
    pub const fn from_words(words: [u32; 4]) -> Self {
        zerocopy::transmute!(words)
    }

    /// The last four bytes, which are the address if it is IPv4.
    #[inline(always)]
    #[must_use]
    pub const fn low(&self) -> [u8; 4] {
        [self.0[12], self.0[13], self.0[14], self.0[15]]
    }

    /// Whether it is in 127.0.0.0/8.
    #[inline(always)]
    #[must_use]
    pub const fn is_v4_loopback(&self) -> bool {
        matches!(self.as_v4(), Some([127, _, _, _]))
    }
}

impl From<IpAddr> for Address {
    fn from(ip: IpAddr) -> Self {
        match ip {
            IpAddr::V4(v4) => Self::v4(v4.octets()),
            IpAddr::V6(v6) => Self(v6.octets()),
        }
    }
}

impl From<Ipv4Addr> for Address {
    fn from(ip: Ipv4Addr) -> Self {
        Self::v4(ip.octets())
    }
}

impl From<Address> for IpAddr {
    fn from(address: Address) -> Self {
        match address.as_v4() {
            Some(octets) => Self::V4(Ipv4Addr::from(octets)),
            None => Self::V6(Ipv6Addr::from(address.0)),
        }
    }
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&IpAddr::from(*self), f)
    }
}

/// A port in network order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(transparent)]
pub struct Port(pub [u8; 2]);

impl Port {
    /// From the host's order.
    #[inline(always)]
    #[must_use]
    pub const fn new(port: u16) -> Self {
        Self(port.to_be_bytes())
    }

    /// In the host's order.
    #[inline(always)]
    #[must_use]
    pub const fn get(self) -> u16 {
        u16::from_be_bytes(self.0)
    }
}

impl fmt::Debug for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.get().fmt(f)
    }
}
