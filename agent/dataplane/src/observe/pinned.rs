//! The pinned maps, opened for reading: by key, and as the tables of the logic crate.

use std::cell::RefCell;
use std::io;
use std::os::fd::AsFd as _;
use std::path::Path;

use aya::maps::{MapData, MapInfo};
use weft_ebpf_abi::{
    Address, AffinityKey, AffinityValue, BackendKey, BackendValue, NodeConfig, PodRange, ServiceKey,
    ServiceValue, SlotKey, SourceData, SourceKey, names, policy::RangeKey,
};
use weft_ebpf_logic::Tables;
use weft_ebpf_logic::direct::Nodes;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::ObserveError;
use crate::sys;

/// Bits of a [`SourceKey`] that names one client: the list and the whole address.
const SOURCE_BITS: u32 = 32 + 128;
/// Bits of a [`RangeKey`] that names one address.
const ADDRESS_BITS: u32 = 128;

/// One pinned map of known sizes.
#[derive(Debug)]
pub(crate) struct PinnedMap {
    name: &'static str,
    data: MapData,
}

impl PinnedMap {
    /// Opens a pin and makes sure that keys and values have the sizes of these types: the kernel writes as much as the map says.
    pub(crate) fn open<K, V>(pins: &Path, name: &'static str) -> Result<Self, ObserveError> {
        let (data, info) = open_any(pins, name)?;
        if info.key_size() as usize != size_of::<K>() || info.value_size() as usize != size_of::<V>() {
            return Err(ObserveError::Layout { map: name });
        }
        Ok(Self { name, data })
    }

    fn failed(&self) -> impl FnOnce(io::Error) -> ObserveError {
        let map = self.name;
        move |source| ObserveError::Read { map, source }
    }

    /// The value of a key.
    pub(crate) fn get<K, V>(&self, key: &K) -> Result<Option<V>, ObserveError>
    where
        K: IntoBytes + Immutable,
        V: FromBytes + IntoBytes,
    {
        let mut value = V::new_zeroed();
        let found = sys::lookup(self.data.fd().as_fd(), key.as_bytes(), value.as_mut_bytes());
        Ok(found.map_err(self.failed())?.then_some(value))
    }

    /// All keys and values.
    pub(crate) fn dump<K: FromBytes, V: FromBytes>(&self) -> Result<Vec<(K, V)>, ObserveError> {
        let (keys, values) =
            sys::read_all(self.data.fd().as_fd(), size_of::<K>(), size_of::<V>()).map_err(self.failed())?;
        let pairs = keys.chunks_exact(size_of::<K>()).zip(values.chunks_exact(size_of::<V>()));
        Ok(pairs
            .filter_map(|(k, v)| Some((K::read_from_bytes(k).ok()?, V::read_from_bytes(v).ok()?)))
            .collect())
    }
}

/// Opens a pin, whatever its type.
pub(super) fn open_any(pins: &Path, name: &'static str) -> Result<(MapData, MapInfo), ObserveError> {
    let path = pins.join("maps").join(name);
    let open = |source| ObserveError::Open { path: path.clone(), source };
    let data = MapData::from_pin(&path).map_err(open)?;
    let info = data.info().map_err(open)?;
    Ok((data, info))
}

/// The maps that decisions are made from.
#[derive(Debug)]
pub struct Pinned {
    services: PinnedMap,
    slots: PinnedMap,
    backends: PinnedMap,
    addresses: PinnedMap,
    affinity: PinnedMap,
    sources: PinnedMap,
    config: PinnedMap,
    direct: PinnedMap,
    pod_ranges: PinnedMap,
    /// The first read that failed while the logic ran: its tables know no errors.
    failed: RefCell<Option<ObserveError>>,
}

impl Pinned {
    /// Opens the maps of a node.
    ///
    /// # Errors
    /// If one is not there or was made by another version.
    pub fn open(pins: &Path) -> Result<Self, ObserveError> {
        Ok(Self {
            services: PinnedMap::open::<ServiceKey, ServiceValue>(pins, names::SERVICES)?,
            slots: PinnedMap::open::<SlotKey, BackendKey>(pins, names::SLOTS)?,
            backends: PinnedMap::open::<BackendKey, BackendValue>(pins, names::BACKENDS)?,
            addresses: PinnedMap::open::<Address, u32>(pins, names::NODE_ADDRESSES)?,
            affinity: PinnedMap::open::<AffinityKey, AffinityValue>(pins, names::AFFINITY)?,
            sources: PinnedMap::open::<SourceKey, u32>(pins, names::SOURCES)?,
            config: PinnedMap::open::<u32, NodeConfig>(pins, names::CONFIG)?,
            direct: PinnedMap::open::<RangeKey, u32>(pins, names::DIRECT)?,
            pod_ranges: PinnedMap::open::<u32, PodRange>(pins, names::POD_RANGES)?,
            failed: RefCell::new(None),
        })
    }

    /// What the programs know of their node; `None` before the agent has told them.
    pub(crate) fn node_config(&self) -> Result<Option<NodeConfig>, ObserveError> {
        let config: Option<NodeConfig> = self.config.get(&0_u32)?;
        Ok(config.filter(|config| config.layout == weft_ebpf_abi::LAYOUT))
    }

    /// Services' addresses and ports.
    pub(crate) fn services(&self) -> Result<Vec<(ServiceKey, ServiceValue)>, ObserveError> {
        self.services.dump()
    }

    /// One of them.
    pub(crate) fn service_value(&self, key: &ServiceKey) -> Result<Option<ServiceValue>, ObserveError> {
        self.services.get(key)
    }

    /// A backend.
    pub(crate) fn backend_value(&self, key: &BackendKey) -> Result<Option<BackendValue>, ObserveError> {
        self.backends.get(key)
    }

    /// A place in a list.
    pub(crate) fn slot_value(&self, list: u32, index: u32) -> Result<Option<BackendKey>, ObserveError> {
        self.slots.get(&SlotKey { list, index })
    }

    /// What failed while the logic ran on these tables.
    pub(crate) fn check(&self) -> Result<(), ObserveError> {
        self.failed.take().map_or(Ok(()), Err)
    }

    fn note<T>(&self, outcome: Result<Option<T>, ObserveError>) -> Option<T> {
        outcome.unwrap_or_else(|error| {
            self.failed.borrow_mut().get_or_insert(error);
            None
        })
    }
}

impl Tables for Pinned {
    fn service(&self, key: &ServiceKey) -> Option<ServiceValue> {
        self.note(self.service_value(key))
    }

    fn slot(&self, key: &SlotKey) -> Option<BackendKey> {
        self.note(self.slots.get(key))
    }

    fn backend(&self, key: &BackendKey) -> Option<BackendValue> {
        self.note(self.backend_value(key))
    }

    fn is_node_address(&self, address: &Address) -> bool {
        self.note(self.addresses.get::<_, u32>(address)).is_some()
    }

    fn source_allowed(&self, list: u32, client: &Address) -> bool {
        let data = SourceData { list: list.to_be_bytes(), address: *client };
        self.note(self.sources.get::<_, u32>(&SourceKey { prefix_bits: SOURCE_BITS, data })).is_some()
    }

    fn affinity(&self, key: &AffinityKey) -> Option<AffinityValue> {
        self.note(self.affinity.get(key))
    }

    /// A question changes nothing.
    fn remember(&self, _: &AffinityKey, _: &AffinityValue) {}

    /// The first place: an answer must not differ from one time to the next.
    fn random(&self) -> u32 {
        0
    }

    /// The clock that the programs read: CLOCK_MONOTONIC.
    fn now_seconds(&self) -> u32 {
        sys::monotonic_seconds()
    }
}

impl Nodes for Pinned {
    fn takes_bytes(&self, address: &Address) -> Option<u32> {
        let key = RangeKey { prefix_bits: ADDRESS_BITS, address: *address };
        let is_pods = || {
            let family = u32::from(address.as_v4().is_none());
            self.note(self.pod_ranges.get::<_, PodRange>(&family))
                .is_some_and(|range| range.contains(address))
        };
        self.note(self.direct.get(&key)).or_else(|| is_pods().then_some(0))
    }
}
