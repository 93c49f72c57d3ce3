//! Events of flows: from the ring buffer to everybody who watches.
//!
//! One task takes events, as long as somebody subscribes. It keeps telling the programs so; when it ends in whatever way, they
//! fall silent a few seconds later by themselves.

mod pods;
mod ring;

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::sync::{broadcast, watch};
use tokio_util::sync::CancellationToken;
use weft_ebpf_abi::Watched;

use super::ObserveError;
use super::wire::Protocol;
use pods::PodsByCgroup;
use ring::Ring;

/// Events that a watcher may be behind before it loses some.
const MAX_BEHIND: usize = 4_096;
/// How long the programs go on without being told again.
const WATCH_SECONDS: u32 = 6;
/// How often they are told, and lost events counted.
const RENEW: Duration = Duration::from_secs(2);
/// After a failure of the ring.
const PAUSE: Duration = Duration::from_secs(1);

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum FlowKind {
    /// A socket was connected to a backend.
    Connect,
    /// A datagram was sent to a backend.
    Datagram,
    /// The first packet of a flow was translated.
    Packet,
    /// Traffic was refused or dropped.
    Drop,
}

/// A flow, as a node saw it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Flow {
    /// When.
    pub time: Timestamp,
    /// What.
    pub kind: FlowKind,
    /// Transport protocol.
    pub protocol: Protocol,
    /// The client's address and port; sockets have none yet.
    pub source: Option<SocketAddr>,
    /// Uid of the client's pod; `None` for a process of the node and for packets.
    pub pod_uid: Option<String>,
    /// What was asked for.
    pub destination: SocketAddr,
    /// What it got.
    pub backend: Option<SocketAddr>,
    /// Why it was dropped: name of the [`DropReason`](weft_ebpf_abi::DropReason).
    pub reason: Option<String>,
}

/// What a watcher gets.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Seen {
    /// From here on everything is seen.
    Watching,
    /// A flow.
    Flow(Flow),
    /// So many events found no room.
    Lost(u64),
    /// The ring can't be read; it is tried again.
    Failed(String),
}

/// How many watch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Interest {
    all: usize,
    drops: usize,
}

/// Where watchers subscribe.
#[derive(Debug)]
pub struct Hub {
    events: broadcast::Sender<Seen>,
    interest: watch::Sender<Interest>,
}

/// A watcher's place; it is given up by dropping it.
#[derive(Debug)]
pub struct Subscription {
    events: broadcast::Receiver<Seen>,
    interest: watch::Sender<Interest>,
    drops_only: bool,
}

impl Default for Hub {
    fn default() -> Self {
        Self { events: broadcast::Sender::new(MAX_BEHIND), interest: watch::Sender::new(Interest::default()) }
    }
}

impl Hub {
    /// Begins to watch: everything, or only what is dropped.
    #[must_use]
    pub fn subscribe(&self, drops_only: bool) -> Subscription {
        let events = self.events.subscribe();
        self.interest.send_modify(|interest| *count(interest, drops_only) += 1);
        Subscription { events, interest: self.interest.clone(), drops_only }
    }

    /// Takes events while there are watchers, until `shutdown`. `cgroup` is the node's below cgroup2's root.
    pub async fn run(&self, pins: PathBuf, cgroup: PathBuf, shutdown: CancellationToken) {
        let mut interest = self.interest.subscribe();
        let mut pods = PodsByCgroup::new(cgroup);
        while !shutdown.is_cancelled() {
            let wanted = interest.wait_for(|interest| *interest != Interest::default());
            let Some(Ok(_)) = shutdown.run_until_cancelled(wanted).await.map(|is| is.map(|_| ())) else {
                return;
            };
            let pumping = self.pump(&pins, &mut pods, &mut interest);
            if let Some(Err(error)) = shutdown.run_until_cancelled(pumping).await {
                self.publish(Seen::Failed(super::socket::chain(&error)));
                shutdown.run_until_cancelled(tokio::time::sleep(PAUSE)).await;
            }
        }
    }

    /// Takes events until nobody watches any more.
    async fn pump(
        &self,
        pins: &Path,
        pods: &mut PodsByCgroup,
        interest: &mut watch::Receiver<Interest>,
    ) -> Result<(), ObserveError> {
        let mut ring = Ring::open(pins)?;
        // What nobody has taken is from an earlier watch.
        ring.take(|_| {});
        let mut lost = ring.lost()?;
        let mut renew = tokio::time::interval(RENEW);
        loop {
            tokio::select! {
                changed = interest.changed() => {
                    let now = *interest.borrow_and_update();
                    if changed.is_err() || now == Interest::default() {
                        return ring.watch(Watched::default());
                    }
                    ring.watch(until(now))?;
                    self.publish(Seen::Watching);
                }
                _ = renew.tick() => {
                    ring.watch(until(*interest.borrow()))?;
                    let now = ring.lost()?;
                    if now > lost {
                        self.publish(Seen::Lost(now - lost));
                        lost = now;
                    }
                    self.publish(Seen::Watching);
                }
                ready = ring.ready() => {
                    ready?;
                    let mut events = Vec::new();
                    ring.take(|event| events.push(event));
                    for event in events {
                        if let Some(flow) = ring::flow(&event, pods) {
                            self.publish(Seen::Flow(flow));
                        }
                    }
                }
            }
        }
    }

    /// That nobody is left to hear it is found out by the next look at the interest.
    fn publish(&self, seen: Seen) {
        let _ = self.events.send(seen);
    }
}

fn count(interest: &mut Interest, drops_only: bool) -> &mut usize {
    if drops_only { &mut interest.drops } else { &mut interest.all }
}

/// What the programs are told.
fn until(interest: Interest) -> Watched {
    let until = crate::sys::monotonic_seconds().saturating_add(WATCH_SECONDS);
    let when = |watchers: usize| if watchers > 0 { until } else { 0 };
    Watched { flows_until: when(interest.all), drops_until: when(interest.drops) }
}

impl Subscription {
    /// The next thing seen; `None` once the hub is gone.
    pub async fn next(&mut self) -> Option<Seen> {
        loop {
            match self.events.recv().await {
                Ok(Seen::Flow(flow)) if self.drops_only && flow.kind != FlowKind::Drop => {}
                Ok(seen) => return Some(seen),
                Err(broadcast::error::RecvError::Lagged(count)) => return Some(Seen::Lost(count)),
                Err(broadcast::error::RecvError::Closed) => return None,
            }
        }
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        let drops_only = self.drops_only;
        self.interest.send_modify(|interest| {
            let count = count(interest, drops_only);
            *count = count.saturating_sub(1);
        });
    }
}

/// An address and port, unless it is none.
fn endpoint(address: weft_ebpf_abi::Address, port: weft_ebpf_abi::Port) -> Option<SocketAddr> {
    (address != weft_ebpf_abi::Address::ANY).then(|| SocketAddr::new(IpAddr::from(address), port.get()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flow(kind: FlowKind) -> Seen {
        Seen::Flow(Flow {
            time: Timestamp::UNIX_EPOCH,
            kind,
            protocol: Protocol::Tcp,
            source: None,
            pod_uid: None,
            destination: SocketAddr::from(([10, 43, 0, 1], 443)),
            backend: None,
            reason: None,
        })
    }

    #[tokio::test]
    async fn a_watcher_of_drops_gets_only_drops_and_hears_of_what_it_missed() {
        let hub = Hub::default();
        let (mut all, mut drops) = (hub.subscribe(false), hub.subscribe(true));
        hub.publish(flow(FlowKind::Connect));
        hub.publish(flow(FlowKind::Drop));
        assert_eq!(all.next().await, Some(flow(FlowKind::Connect)));
        assert_eq!(drops.next().await, Some(flow(FlowKind::Drop)));
        for _ in 0..MAX_BEHIND + 8 {
            hub.publish(flow(FlowKind::Drop));
        }
        assert_eq!(drops.next().await, Some(Seen::Lost(8)));
    }

    #[test]
    fn the_programs_are_told_who_watches_and_that_nobody_does() {
        let hub = Hub::default();
        let drops = hub.subscribe(true);
        let watched = until(*hub.interest.borrow());
        assert!(watched.drops_until > 0 && watched.flows_until == 0);
        let all = hub.subscribe(false);
        assert!(until(*hub.interest.borrow()).flows_until > 0);
        drop((drops, all));
        assert_eq!(*hub.interest.borrow(), Interest::default());
        assert_eq!(until(Interest::default()), Watched::default());
    }
}
