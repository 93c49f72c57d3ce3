//! The ring buffer of events, and the maps beside it.

use std::path::Path;

use aya::maps::{Array, Map, MapData, PerCpuArray, RingBuf};
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use tokio::io::unix::AsyncFd;
use weft_ebpf_abi::{
    DropReason, EVENT_CONNECT, EVENT_DATAGRAM, EVENT_DROP, EVENT_PACKET, FlowEvent, Watched, names,
};
use zerocopy::{FromBytes, IntoBytes};

use super::pods::PodsByCgroup;
use super::{Flow, FlowKind, endpoint};
use crate::observe::ObserveError;
use crate::observe::wire::Protocol;

const WATCHED_BYTES: usize = size_of::<Watched>();

/// The pinned maps of events.
pub(super) struct Ring {
    events: AsyncFd<RingBuf<MapData>>,
    watched: Array<MapData, [u8; WATCHED_BYTES]>,
    lost: PerCpuArray<MapData, u64>,
}

impl Ring {
    pub(super) fn open(pins: &Path) -> Result<Self, ObserveError> {
        let pin = |name: &'static str| {
            let path = pins.join("maps").join(name);
            let open = |source| ObserveError::Open { path: path.clone(), source };
            MapData::from_pin(&path).map_err(open)
        };
        let typed = |name| move |_| ObserveError::Layout { map: name };
        let events = RingBuf::try_from(Map::RingBuf(pin(names::EVENTS)?)).map_err(typed(names::EVENTS))?;
        let watched = Array::try_from(Map::Array(pin(names::WATCHED)?)).map_err(typed(names::WATCHED))?;
        let lost = PerCpuArray::try_from(Map::PerCpuArray(pin(names::LOST)?)).map_err(typed(names::LOST))?;
        // SAFETY: the descriptor is the map's, which lives as long as the ring and never changes.
        let events =
            unsafe { AsyncFd::register(events) }.map_err(|error| failed(names::EVENTS)(error.into()))?;
        Ok(Self { events, watched, lost })
    }

    /// Tells the programs until when somebody watches.
    pub(super) fn watch(&mut self, watched: Watched) -> Result<(), ObserveError> {
        let mut bytes = [0; WATCHED_BYTES];
        bytes.copy_from_slice(watched.as_bytes());
        self.watched.set(0, bytes, 0).map_err(map_failed(names::WATCHED))
    }

    /// How many events found no room since the maps were made.
    pub(super) fn lost(&self) -> Result<u64, ObserveError> {
        let values = self.lost.get(&0, 0).map_err(map_failed(names::LOST))?;
        Ok(values.iter().sum())
    }

    /// Waits for events.
    pub(super) async fn ready(&mut self) -> Result<(), ObserveError> {
        let mut guard = self.events.readable_mut().await.map_err(failed(names::EVENTS))?;
        // The kernel wakes a reader that has taken everything: `take` does so before the next wait.
        guard.clear_ready();
        Ok(())
    }

    /// Takes what is there.
    pub(super) fn take(&mut self, mut each: impl FnMut(FlowEvent)) {
        while let Some(item) = self.events.get_mut().next() {
            if let Ok(event) = FlowEvent::read_from_bytes(&item) {
                each(event);
            }
        }
    }
}

fn failed(map: &'static str) -> impl FnOnce(std::io::Error) -> ObserveError {
    move |source| ObserveError::Read { map, source }
}

fn map_failed(map: &'static str) -> impl FnOnce(aya::maps::MapError) -> ObserveError {
    move |source| ObserveError::Read { map, source: std::io::Error::other(source) }
}

/// An event in the words of an answer; `None` for a kind that this program does not know.
pub(super) fn flow(event: &FlowEvent, pods: &mut PodsByCgroup) -> Option<Flow> {
    let kind = match event.kind {
        EVENT_CONNECT => FlowKind::Connect,
        EVENT_DATAGRAM => FlowKind::Datagram,
        EVENT_PACKET => FlowKind::Packet,
        EVENT_DROP => FlowKind::Drop,
        _ => return None,
    };
    let reason = DropReason::ALL.into_iter().find(|reason| *reason as u32 == event.reason);
    let age_ns = crate::sys::monotonic_ns().saturating_sub(event.time_ns);
    let age = SignedDuration::from_nanos(i64::try_from(age_ns).unwrap_or(0));
    Some(Flow {
        time: Timestamp::now().checked_sub(age).ok()?,
        kind,
        protocol: Protocol::from_number(event.protocol)?,
        source: endpoint(event.source, event.source_port),
        pod_uid: (event.cgroup_id != 0).then(|| pods.uid(event.cgroup_id)).flatten(),
        destination: endpoint(event.destination, event.destination_port)?,
        backend: endpoint(event.backend, event.backend_port),
        reason: reason.map(|reason| reason.name().to_owned()),
    })
}
