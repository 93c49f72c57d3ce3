//! What each Service has in the maps, kept small: there may be tens of thousands.

use weft_ebpf_abi::{BackendKey, ServiceKey};

use crate::desired::{Claim, Desired, Known, ListName};
use crate::tables::ServiceName;

/// A Service, within one run of the agent.
pub(super) type Id = u32;

/// What a Service has in the maps, or may have after operations that failed.
#[derive(Debug)]
pub(super) struct Owned {
    pub(super) name: ServiceName,
    /// Seconds of the epoch when the Service was made.
    pub(super) created: i64,
    /// Addresses, with the claim to those that it wants.
    pub(super) frontends: Box<[(ServiceKey, Option<Claim>)]>,
    /// Lists with their numbers, in order.
    pub(super) lists: Box<[(ListName, u32)]>,
    pub(super) backends: Box<[BackendKey]>,
    facts: Facts,
}

/// What is counted over all Services.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Facts {
    live: bool,
    left_out: usize,
    ejected: usize,
    no_local_internal: bool,
    no_local_external: bool,
}

impl Owned {
    pub(super) fn new(name: ServiceName) -> Self {
        Self {
            name,
            created: 0,
            frontends: Box::default(),
            lists: Box::default(),
            backends: Box::default(),
            facts: Facts::default(),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.frontends.is_empty() && self.lists.is_empty() && self.backends.is_empty()
    }

    /// Number of a list.
    pub(super) fn number(&self, list: &ListName) -> Option<u32> {
        let place = self.lists.binary_search_by_key(list, |(name, _)| *name).ok()?;
        self.lists.get(place).map(|(_, number)| *number)
    }

    /// The right to an address, if the Service still wants it.
    pub(super) fn right_to(&self, key: &ServiceKey) -> Option<(Claim, i64, &ServiceName)> {
        let (_, claim) = self.frontends.iter().find(|(k, _)| k == key)?;
        Some(((*claim)?, self.created, &self.name))
    }

    /// Enters what is to be counted; returns what was.
    pub(super) fn set_facts(&mut self, desired: &Desired) -> Facts {
        let facts = Facts {
            live: !desired.frontends.is_empty(),
            left_out: desired.left_out,
            ejected: desired.ejected.len(),
            no_local_internal: desired.no_local_internal,
            no_local_external: desired.no_local_external,
        };
        std::mem::replace(&mut self.facts, facts)
    }

    pub(super) fn facts(&self) -> Facts {
        self.facts
    }
}

/// Counts over all Services, kept with every change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Services with an address.
    pub services: usize,
    /// Endpoints of theirs that are left out because their node doesn't answer.
    pub left_out: usize,
    /// Backends of theirs that are left out because connections failed.
    pub ejected: usize,
    /// Services with internalTrafficPolicy Local that have endpoints, and none on this node.
    pub no_local_internal: usize,
    /// Likewise with externalTrafficPolicy Local.
    pub no_local_external: usize,
}

impl Totals {
    pub(super) fn replace(&mut self, old: Facts, new: Facts) {
        let count =
            |total: &mut usize, old: bool, new: bool| *total = *total + usize::from(new) - usize::from(old);
        count(&mut self.services, old.live, new.live);
        self.left_out = self.left_out + new.left_out - old.left_out;
        self.ejected = self.ejected + new.ejected - old.ejected;
        count(&mut self.no_local_internal, old.no_local_internal, new.no_local_internal);
        count(&mut self.no_local_external, old.no_local_external, new.no_local_external);
    }
}

/// The Services that know a backend: nearly always one, and then it takes 16 bytes.
#[derive(Debug)]
pub(super) enum Users {
    One { owner: u64, id: Id, active: bool },
    Many(Vec<(Id, Known)>),
}

impl Users {
    pub(super) fn one(id: Id, Known { owner, active }: Known) -> Self {
        Self::One { owner, id, active }
    }

    /// Enters what a Service knows of it.
    pub(super) fn set(&mut self, id: Id, known: Known) {
        match self {
            Self::One { id: user, .. } if *user == id => *self = Self::one(id, known),
            Self::One { owner, id: user, active } => {
                let first = Known { owner: *owner, active: *active };
                *self = Self::Many(vec![(*user, first), (id, known)]);
            }
            Self::Many(users) => match users.iter_mut().find(|(user, _)| *user == id) {
                Some((_, old)) => *old = known,
                None => users.push((id, known)),
            },
        }
    }

    /// Removes a Service; says whether nobody is left.
    pub(super) fn remove(&mut self, id: Id) -> bool {
        match self {
            Self::One { id: user, .. } => *user == id,
            Self::Many(users) => {
                users.retain(|(user, _)| *user != id);
                users.is_empty()
            }
        }
    }

    /// What all of them know: it is active if it is for one, and then that one says whose it is.
    pub(super) fn sum(&self) -> Known {
        match self {
            Self::One { owner, active, .. } => Known { owner: *owner, active: *active },
            Self::Many(users) => {
                let best = users.iter().max_by_key(|(user, known)| (known.active, std::cmp::Reverse(*user)));
                best.map_or(Known { owner: 0, active: false }, |(_, known)| *known)
            }
        }
    }
}
