//! What each Service has in the maps, kept small: there may be tens of thousands.

use weft_ebpf_abi::ServiceKey;

use crate::desired::{Claim, Desired, ListName};
use crate::rows::Place;

/// A Service that has something in the maps: where it stands among them.
pub(super) type Id = Place;

/// What a Service has in the maps, or may have after operations that failed.
#[derive(Debug, Default)]
pub(super) struct Owned {
    /// Seconds of the epoch when the Service was made.
    pub(super) created: i64,
    /// Addresses, with the claim to those that it wants.
    pub(super) frontends: Box<[(ServiceKey, Option<Claim>)]>,
    /// Lists with their numbers, in order.
    pub(super) lists: Box<[(ListName, u32)]>,
    /// Where its backends stand, each of which it refers to.
    pub(super) backends: Box<[Place]>,
    facts: Facts,
}
const _: () = assert!(size_of::<Owned>() <= 72);

/// What is counted over all Services.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Facts {
    left_out: u32,
    ejected: u32,
    live: bool,
    no_local_internal: bool,
    no_local_external: bool,
}

impl Owned {
    pub(super) fn is_empty(&self) -> bool {
        self.frontends.is_empty() && self.lists.is_empty() && self.backends.is_empty()
    }

    /// Number of a list.
    pub(super) fn number(&self, list: &ListName) -> Option<u32> {
        let place = self.lists.binary_search_by_key(list, |(name, _)| *name).ok()?;
        self.lists.get(place).map(|(_, number)| *number)
    }

    /// The right to an address, if the Service still wants it.
    pub(super) fn right_to(&self, key: &ServiceKey) -> Option<(Claim, i64)> {
        let (_, claim) = self.frontends.iter().find(|(k, _)| k == key)?;
        Some(((*claim)?, self.created))
    }

    /// Enters what is to be counted; returns what was.
    pub(super) fn set_facts(&mut self, desired: &Desired) -> Facts {
        let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
        let facts = Facts {
            left_out: count(desired.left_out),
            ejected: count(desired.ejected.len()),
            live: !desired.frontends.is_empty(),
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
        self.left_out = self.left_out + new.left_out as usize - old.left_out as usize;
        self.ejected = self.ejected + new.ejected as usize - old.ejected as usize;
        count(&mut self.no_local_internal, old.no_local_internal, new.no_local_internal);
        count(&mut self.no_local_external, old.no_local_external, new.no_local_external);
    }
}
