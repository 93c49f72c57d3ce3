//! The load-balancer addresses of all Services that this node is fit to answer for. An address may be several Services'.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use crate::tables::ServiceName;

/// Kept by the change of one Service at a time.
#[derive(Debug, Default)]
pub(crate) struct Answers {
    of: HashMap<ServiceName, BTreeSet<IpAddr>>,
    /// How many Services have an address.
    users: BTreeMap<IpAddr, usize>,
    changed: bool,
}

impl Answers {
    /// Notes what one Service has now.
    pub(crate) fn note(&mut self, name: &ServiceName, addresses: &BTreeSet<IpAddr>) {
        let before = if addresses.is_empty() {
            self.of.remove(name)
        } else if self.of.get(name) == Some(addresses) {
            return;
        } else {
            self.of.insert(name.clone(), addresses.clone())
        };
        let before = before.unwrap_or_default();
        for address in addresses.difference(&before) {
            let users = self.users.entry(*address).or_default();
            *users += 1;
            self.changed |= *users == 1;
        }
        for address in before.difference(addresses) {
            if let Some(users) = self.users.get_mut(address) {
                *users -= 1;
                if *users == 0 {
                    self.users.remove(address);
                    self.changed = true;
                }
            }
        }
    }

    /// All addresses, if they have changed since the last call.
    pub(crate) fn take(&mut self) -> Option<BTreeSet<IpAddr>> {
        std::mem::take(&mut self.changed).then(|| self.users.keys().copied().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_stays_until_its_last_service_goes() {
        let name = |name: &str| ServiceName::new("default", name);
        let set = |last: &[u8]| last.iter().map(|n| IpAddr::from([10, 44, 0, *n])).collect::<BTreeSet<_>>();
        let mut answers = Answers::default();
        assert_eq!(answers.take(), None);
        answers.note(&name("a"), &set(&[1, 2]));
        answers.note(&name("b"), &set(&[2]));
        assert_eq!(answers.take(), Some(set(&[1, 2])));
        answers.note(&name("b"), &set(&[2]));
        assert_eq!(answers.take(), None, "nothing new");
        answers.note(&name("a"), &set(&[]));
        assert_eq!(answers.take(), Some(set(&[2])));
        answers.note(&name("b"), &set(&[]));
        assert_eq!(answers.take(), Some(set(&[])));
    }
}
