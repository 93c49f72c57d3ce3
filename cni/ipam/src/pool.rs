//! Which address is next: next-fit over a subnet, so that an address that was given back rests as long as possible.

use std::net::Ipv4Addr;

use ipnetwork::Ipv4Network;

/// A subnet's addresses for pods: all but the network's, the broadcast's and the gateway's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pool {
    subnet: Ipv4Network,
    gateway: Ipv4Addr,
}

impl Pool {
    /// A pool. The gateway is an address of the subnet.
    pub fn new(subnet: Ipv4Network, gateway: Ipv4Addr) -> Self {
        Self { subnet, gateway }
    }

    /// Whether a pod may have this address.
    pub fn holds(&self, address: Ipv4Addr) -> bool {
        self.subnet.contains(address)
            && address != self.subnet.network()
            && address != self.subnet.broadcast()
            && address != self.gateway
    }

    /// How many pods there is room for.
    pub fn size(&self) -> u32 {
        // Network, broadcast and gateway are apart.
        self.subnet.size().saturating_sub(3)
    }

    /// The first address behind `last` that isn't used, going round once.
    pub fn next(&self, last: Option<Ipv4Addr>, used: impl Fn(Ipv4Addr) -> bool) -> Option<Ipv4Addr> {
        let (first, size) = (u32::from(self.subnet.network()), self.subnet.size());
        let start = last.filter(|last| self.subnet.contains(*last)).map_or(0, |last| u32::from(last) - first);
        (1..=size)
            .map(|step| Ipv4Addr::from(first + (start + step) % size))
            .find(|address| self.holds(*address) && !used(*address))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn pool(prefix: u8) -> Pool {
        Pool::new(Ipv4Network::new(Ipv4Addr::new(10, 42, 0, 0), prefix).unwrap(), Ipv4Addr::new(10, 42, 0, 1))
    }

    #[test]
    fn gives_every_address_once_and_then_none() {
        for prefix in [30, 29, 26, 24, 20] {
            let pool = pool(prefix);
            let mut used = BTreeSet::new();
            let mut last = None;
            while let Some(next) = pool.next(last, |address| used.contains(&address)) {
                assert!(pool.holds(next) && used.insert(next));
                last = Some(next);
            }
            assert_eq!(used.len(), pool.size() as usize, "/{prefix}");
        }
    }

    proptest! {
        #[test]
        fn an_address_given_back_rests_until_the_others_were_used(given_back in 0usize..61, start in 0u32..64) {
            let pool = pool(26);
            let first = Some(Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 42, 0, 0)) + start));
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
