//! Backends: what the maps say of each, and which Services know it. There may be hundreds of thousands.

use weft_ebpf_abi::{BACKEND_ACTIVE, BackendKey, BackendValue};

use super::owned::Id;
use crate::desired::Known;
use crate::rows::{Place, Rows};

/// A backend. It is kept while the maps have it, or somebody stands by its place.
#[derive(Debug, Default)]
struct Backend {
    programmed: Option<Programmed>,
    users: Users,
    /// How many places of lists, and Services, name it by where it stands here.
    references: u32,
}
const _: () = assert!(size_of::<(BackendKey, Backend)>() == 64);

impl Backend {
    fn is_idle(&self) -> bool {
        self.programmed.is_none() && self.references == 0
    }
}

/// A [`BackendValue`] in the maps, in a form of which an `Option` is no larger.
#[derive(Clone, Copy, Debug)]
struct Programmed {
    owner: u64,
    generation: u32,
    active: bool,
}

impl From<BackendValue> for Programmed {
    fn from(value: BackendValue) -> Self {
        let active = value.flags & BACKEND_ACTIVE != 0;
        Self { owner: value.owner, generation: value.generation, active }
    }
}

impl From<Programmed> for BackendValue {
    fn from(value: Programmed) -> Self {
        let flags = if value.active { BACKEND_ACTIVE } else { 0 };
        Self { generation: value.generation, flags, owner: value.owner }
    }
}

/// All backends.
#[derive(Debug, Default)]
pub(super) struct Backends {
    rows: Rows<BackendKey, Backend>,
    programmed: usize,
}

impl Backends {
    /// How many are in the maps.
    pub(super) fn programmed(&self) -> usize {
        self.programmed
    }

    /// Those that are in the maps.
    pub(super) fn in_maps(&self) -> impl Iterator<Item = (BackendKey, BackendValue)> {
        self.rows.iter().filter_map(|(key, backend)| Some((*key, backend.programmed?.into())))
    }

    /// Those of them that no Service knows.
    pub(super) fn unused(&self) -> impl Iterator<Item = BackendKey> {
        let unused =
            self.rows.iter().filter(|(_, b)| b.programmed.is_some() && matches!(b.users, Users::None));
        unused.map(|(key, _)| *key)
    }

    /// What the maps say of one.
    pub(super) fn value(&self, key: &BackendKey) -> Option<BackendValue> {
        self.rows.get(key)?.programmed.map(Into::into)
    }

    /// The one at a place.
    pub(super) fn key(&self, place: Place) -> Option<BackendKey> {
        self.rows.at(place).map(|(key, _)| *key)
    }

    /// The one at a place with what the maps say of it, and what its Services say together.
    pub(super) fn look(&self, place: Place) -> Option<(BackendKey, Option<BackendValue>, Option<Known>)> {
        let (key, backend) = self.rows.at(place)?;
        Some((*key, backend.programmed.map(Into::into), backend.users.sum()))
    }

    /// Notes what the maps say of one from now on.
    pub(super) fn set_value(&mut self, key: BackendKey, value: Option<BackendValue>) {
        let backend = self.rows.or_default(key);
        let before = std::mem::replace(&mut backend.programmed, value.map(Into::into));
        self.programmed = self.programmed + usize::from(value.is_some()) - usize::from(before.is_some());
        if backend.is_idle() {
            self.rows.remove(&key);
        }
    }

    /// The place of one, named once more; until [`Self::release`] it stays that backend's.
    pub(super) fn refer(&mut self, key: BackendKey) -> Place {
        let place = self.rows.enter(key, |_| Backend::default());
        if let Some(backend) = self.rows.at_mut(place) {
            backend.references += 1;
        }
        place
    }

    /// Undoes a [`Self::refer`].
    pub(super) fn release(&mut self, place: Place) {
        let Some(backend) = self.rows.at_mut(place) else { return };
        backend.references = backend.references.saturating_sub(1);
        if backend.is_idle()
            && let Some(key) = self.key(place)
        {
            self.rows.remove(&key);
        }
    }

    /// Enters what a Service, that has referred to it, knows of one.
    pub(super) fn set_user(&mut self, place: Place, id: Id, known: Known) {
        if let Some(backend) = self.rows.at_mut(place) {
            backend.users.set(id, known);
        }
    }

    /// A Service no longer knows it; it may still refer to it.
    pub(super) fn remove_user(&mut self, place: Place, id: Id) {
        if let Some(backend) = self.rows.at_mut(place) {
            backend.users.remove(id);
        }
    }
}

/// The Services that know a backend: nearly always one.
#[derive(Debug, Default)]
enum Users {
    #[default]
    None,
    One {
        owner: u64,
        id: Id,
        active: bool,
    },
    #[expect(clippy::box_collection, reason = "rare, and the others must be small")]
    Many(Box<Vec<(Id, Known)>>),
}

impl Users {
    /// Enters what a Service knows of it.
    fn set(&mut self, id: Id, known: Known) {
        let one = Self::One { owner: known.owner, id, active: known.active };
        match self {
            Self::None => *self = one,
            Self::One { id: user, .. } if *user == id => *self = one,
            Self::One { owner, id: user, active } => {
                let first = Known { owner: *owner, active: *active };
                *self = Self::Many(Box::new(vec![(*user, first), (id, known)]));
            }
            Self::Many(users) => match users.iter_mut().find(|(user, _)| *user == id) {
                Some((_, old)) => *old = known,
                None => users.push((id, known)),
            },
        }
    }

    /// Removes a Service.
    fn remove(&mut self, id: Id) {
        match self {
            Self::One { id: user, .. } if *user == id => *self = Self::None,
            Self::None | Self::One { .. } => {}
            Self::Many(users) => {
                users.retain(|(user, _)| *user != id);
                if let [(id, Known { owner, active })] = users[..] {
                    *self = Self::One { owner, id, active };
                }
            }
        }
    }

    /// What all of them know: it is active if it is for one, and then that one says whose it is.
    fn sum(&self) -> Option<Known> {
        match self {
            Self::None => None,
            Self::One { owner, active, .. } => Some(Known { owner: *owner, active: *active }),
            Self::Many(users) => {
                let best = users.iter().max_by_key(|(user, known)| (known.active, std::cmp::Reverse(*user)));
                best.map(|(_, known)| *known)
            }
        }
    }
}
