//! Which address is next: next-fit over a subnet, so that an address that was given back rests as long as possible.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnetwork::IpNetwork;

/// A subnet's addresses for pods: all but the network's (on IPv6, that of any router), IPv4's broadcast and the gateway's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pool {
    subnet: IpNetwork,
    gateway: IpAddr,
}

impl Pool {
    /// A pool. The gateway is an address of the subnet.
    pub fn new(subnet: IpNetwork, gateway: IpAddr) -> Self {
        Self { subnet, gateway }
    }

    /// Whether a pod may have this address.
    pub fn holds(&self, address: IpAddr) -> bool {
        self.subnet.contains(address)
            && address != self.subnet.network()
            && (address.is_ipv6() || address != self.subnet.broadcast())
            && address != self.gateway
    }

    /// Whether addresses of this family are served.
    pub fn serves(&self, address: IpAddr) -> bool {
        self.subnet.is_ipv4() == address.is_ipv4()
    }

    /// How many pods there is room for.
    pub fn size(&self) -> u128 {
        // Network, gateway and IPv4's broadcast are apart.
        self.addresses().saturating_sub(if self.subnet.is_ipv4() { 3 } else { 2 })
    }

    /// The first address behind `last` that isn't used, going round once.
    pub fn next(&self, last: Option<IpAddr>, used: impl Fn(IpAddr) -> bool) -> Option<IpAddr> {
        let start = last.and_then(|last| self.offset(last)).unwrap_or(0);
        let size = self.addresses();
        (1..=size)
            .map(|step| self.address((start + step) % size))
            .find(|address| self.holds(*address) && !used(*address))
    }

    /// How far an address is from the subnet's first.
    pub(crate) fn offset(&self, address: IpAddr) -> Option<u128> {
        self.subnet.contains(address).then(|| number(address) - number(self.subnet.network()))
    }

    /// The address at a distance from the subnet's first, if a pod may have it.
    pub(crate) fn at(&self, offset: u128) -> Option<IpAddr> {
        (offset < self.addresses()).then(|| self.address(offset)).filter(|address| self.holds(*address))
    }

    fn address(&self, offset: u128) -> IpAddr {
        let number = number(self.subnet.network()) + offset;
        match self.subnet {
            // An offset is less than the subnet's size.
            IpNetwork::V4(_) => Ipv4Addr::from(u32::try_from(number).unwrap_or(u32::MAX)).into(),
            IpNetwork::V6(_) => Ipv6Addr::from(number).into(),
        }
    }

    fn addresses(&self) -> u128 {
        let bits = if self.subnet.is_ipv4() { 32 } else { 128 };
        1u128.checked_shl(bits - u32::from(self.subnet.prefix())).unwrap_or(u128::MAX)
    }
}

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => u32::from(address).into(),
        IpAddr::V6(address) => address.into(),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn pool(prefix: u8) -> Pool {
        let network = Ipv4Addr::new(10, 42, 0, 0);
        Pool::new(IpNetwork::new(network.into(), prefix).unwrap(), Ipv4Addr::new(10, 42, 0, 1).into())
    }

    fn pool6(prefix: u8) -> Pool {
        let network = format!("fd00:42::/{prefix}").parse().unwrap();
        Pool::new(network, "fd00:42::1".parse().unwrap())
    }

    #[test]
    fn gives_every_address_once_and_then_none() {
        for pool in [30, 29, 26, 24, 20].map(pool).into_iter().chain([126, 125, 120, 112].map(pool6)) {
            let mut used = BTreeSet::new();
            let mut last = None;
            while let Some(next) = pool.next(last, |address| used.contains(&address)) {
                assert!(pool.holds(next) && used.insert(next));
                last = Some(next);
            }
            assert_eq!(used.len() as u128, pool.size(), "{pool:?}");
        }
    }

    #[test]
    fn a_wide_subnet_goes_round_at_its_end() {
        let pool = pool6(64);
        assert_eq!(pool.size(), (1 << 64) - 2);
        let last = "fd00:42::ffff:ffff:ffff:ffff".parse().unwrap();
        assert!(pool.holds(last));
        assert_eq!(pool.next(Some(last), |_| false), Some("fd00:42::2".parse().unwrap()));
        assert_eq!(pool.next(None, |_| false), Some("fd00:42::2".parse().unwrap()));
        assert_eq!(pool.at(pool.offset("fd00:42::77".parse().unwrap()).unwrap()), "fd00:42::77".parse().ok());
        assert_eq!((pool.at(0), pool.at(1), pool.at(1 << 64)), (None, None, None));
    }

    proptest! {
        #[test]
        fn an_address_given_back_rests_until_the_others_were_used(given_back in 0usize..61, start in 0u32..64) {
            let pool = pool(26);
            let first = Some(IpAddr::V4(Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 42, 0, 0)) + start)));
            let mut last = first;
            let mut seen = BTreeSet::new();
            for n in 0..61 {
                let next = pool.next(last, |_| false).unwrap();
                prop_assert!(seen.insert(next), "{next} again after {n}");
                last = Some(next);
            }
            let free = *seen.iter().nth(given_back).unwrap();
            prop_assert_eq!(pool.next(last, |address| address != free), Some(free));
            prop_assert_eq!(pool.next(last, |_| true), None);
        }
    }
}
