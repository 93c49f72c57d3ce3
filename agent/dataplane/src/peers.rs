//! Which other nodes are dead, as this node sees it within two seconds; upstream's life cycle of Nodes takes 40.
//!
//! Each node asks a few others by ICMP echo, which a node's kernel answers whether or not its agent runs. One that finds a
//! node silent tells all others to look at it; everybody believes only what it has seen itself. Who hears nothing from
//! anybody takes that for its own link's fault. (docs/adr/0011)

mod detector;
pub(crate) mod echo;
pub(crate) mod memory;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::Node;
use tokio::net::UdpSocket;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use weft_cni_netlink::Netlink;

use self::detector::{Action, Detector};
use self::echo::Echo;
use self::memory::Memory;
pub use detector::Counts;

/// UDP port at which a node is told to look at another.
pub const PORT: u16 = 8_474;
/// Peers that a node watches all the time: a node's death is seen even if all but one of those who watch it die with it.
pub const WATCHED: usize = 8;
/// Of those in the process who ask by ICMP echo.
const ECHO_NUMBER: u16 = 0;
/// After a socket failed.
const RETRY: Duration = Duration::from_secs(1);
/// First bytes of a hint, with its version; the address follows in its 128-bit form.
const MAGIC: [u8; 8] = *b"weftlk01";
const HINT_BYTES: usize = 24;
/// Hints sent before others get their turn.
const HINTS_AT_ONCE: usize = 256;
/// Routed nowhere of its own, so the way to it is the default route (RFC 7600 §6, RFC 6666).
const ELSEWHERE_V4: Ipv4Addr = Ipv4Addr::new(192, 0, 0, 8);
const ELSEWHERE_V6: Ipv6Addr = Ipv6Addr::new(0x100, 0, 0, 0, 0, 0, 0, 1);

/// Names and addresses of nodes.
pub type Nodes = BTreeMap<Arc<str>, IpAddr>;

/// What the watch over the other nodes is told.
#[derive(Clone, Debug)]
pub struct Config {
    /// Name of this node.
    pub node_name: String,
    /// Peers to watch all the time: [`WATCHED`].
    pub watched: usize,
    /// The folder of the pins, beside which it is kept who is silent.
    pub pins: PathBuf,
}

/// What others are told of nodes that fall silent or come back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Turn {
    pub(crate) node: Arc<str>,
    pub(crate) address: IpAddr,
    pub(crate) silent: bool,
}

/// Where the outcome goes.
pub struct Told {
    /// The nodes that don't answer.
    pub silent: watch::Sender<Nodes>,
    /// How many answer, whenever that changes.
    pub counts: Box<dyn Fn(Counts) + Send + Sync>,
    pub(crate) turns: Option<mpsc::Sender<Turn>>,
}

impl Told {
    /// Without Events.
    #[must_use]
    pub fn new(silent: watch::Sender<Nodes>, counts: impl Fn(Counts) + Send + Sync + 'static) -> Self {
        Self { silent, counts: Box::new(counts), turns: None }
    }
}

/// The address at which a Node is asked: one of the family of `like`, or else its first.
#[must_use]
pub fn address_of(node: &Node, like: IpAddr) -> Option<IpAddr> {
    let addresses = node.status.as_ref()?.addresses.iter().flatten();
    let internal = addresses.filter(|a| a.type_ == "InternalIP").filter_map(|a| a.address.parse().ok());
    let all: Vec<IpAddr> = internal.collect();
    let of_family = |ip: &&IpAddr| like.is_unspecified() || ip.is_ipv6() == like.is_ipv6();
    all.iter().find(of_family).or(all.first()).copied()
}

/// Watches until `shutdown`. `nodes` are all of the cluster, this one among them; an empty map is none known yet. A socket that
/// fails is opened again; while there is none nobody is newly believed dead.
pub async fn run(config: Config, mut nodes: watch::Receiver<Nodes>, told: Told, shutdown: CancellationToken) {
    let memory = Memory::of(&config.pins);
    let believed = memory.load().unwrap_or_else(|error| {
        tracing::warn!(%error, "what is known of silent nodes can't be read");
        BTreeSet::new()
    });
    let known = nodes.wait_for(|nodes| !nodes.is_empty());
    if !matches!(shutdown.run_until_cancelled(known).await, Some(Ok(_))) {
        return;
    }
    let mut detector = Detector::new(&config.node_name, config.watched, believed);
    detector.set_nodes(&nodes.borrow_and_update().clone(), Instant::now());
    let mut watch = Watch { detector, memory, told, hints: None, first: true };
    loop {
        let outcome = shutdown.run_until_cancelled(watch.run(&mut nodes)).await;
        match outcome {
            None | Some(Ok(())) => return,
            Some(Err(error)) => tracing::warn!(%error, "other nodes can't be watched, will be tried again"),
        }
        if shutdown.run_until_cancelled(tokio::time::sleep(RETRY)).await.is_none() {
            return;
        }
    }
}

struct Watch {
    detector: Detector,
    memory: Memory,
    told: Told,
    /// Hints come and go by it; a node does without if the port is taken.
    hints: Option<UdpSocket>,
    /// Nothing has been told yet: what an earlier agent knew is no news.
    first: bool,
}

impl Watch {
    /// Ends when nobody tells of nodes any more.
    async fn run(&mut self, nodes: &mut watch::Receiver<Nodes>) -> io::Result<()> {
        let mut echo = Echo::open(ECHO_NUMBER)?;
        self.hints = match listen().await {
            Ok(socket) => Some(socket),
            Err(error) => {
                tracing::warn!(%error, port = PORT, "no hints of silent nodes will be heard");
                None
            }
        };
        loop {
            // Answers that wait are taken in before anybody is judged by the clock.
            while let Some((from, _)) = echo.try_answer()? {
                let actions = self.detector.answered(from, Instant::now());
                self.act(&actions, &mut echo).await;
            }
            let (actions, next) = self.detector.due(Instant::now());
            self.act(&actions, &mut echo).await;
            self.tell();
            tokio::select! {
                changed = nodes.changed() => {
                    if changed.is_err() {
                        return Ok(());
                    }
                    let now = nodes.borrow_and_update().clone();
                    self.detector.set_nodes(&now, Instant::now());
                }
                ready = echo.ready() => ready?,
                hint = receive(self.hints.as_ref()) => {
                    if let Some(address) = self.credible(hint) {
                        self.detector.look(address, Instant::now());
                    }
                }
                () = tokio::time::sleep_until(next.into()) => {}
            }
        }
    }

    /// A hint from a node. More is not asked of it: it only makes this node look.
    fn credible(&self, hint: Option<(IpAddr, SocketAddr)>) -> Option<IpAddr> {
        let (about, from) = hint?;
        self.detector.is_peer(from.ip().to_canonical()).then_some(about)
    }

    async fn act(&mut self, actions: &[Action], echo: &mut Echo) {
        for action in actions {
            match *action {
                Action::Ask(address) => echo.ask(address),
                Action::Tell(address) => self.hint(address).await,
                Action::FindGateway { v6 } => self.detector.set_gateway(gateway(v6), v6),
            }
        }
    }

    async fn hint(&self, about: IpAddr) {
        let Some(socket) = &self.hints else { return };
        let (packet, of_both) = (encode(about), socket.local_addr().is_ok_and(|own| own.is_ipv6()));
        for some in self.detector.listeners().chunks(HINTS_AT_ONCE) {
            for to in some.iter().filter(|to| **to != about) {
                // One that is lost is made good by the listener's own questions.
                if let Err(error) = socket.try_send_to(&packet, at(*to, of_both)) {
                    tracing::debug!(%to, %error, "cannot hint at a silent node");
                }
            }
            tokio::task::yield_now().await;
        }
    }

    fn tell(&mut self) {
        let Some(silent) = self.detector.take_silent() else { return };
        (self.told.counts)(self.detector.counts());
        let before = self.told.silent.borrow().clone();
        if silent != before {
            let addresses = silent.values().copied().collect();
            if let Err(error) = self.memory.store(&addresses) {
                tracing::warn!(%error, source = ?std::error::Error::source(&error), "silent nodes are not kept in mind");
            }
            self.tell_turns(&before, &silent);
            self.told.silent.send_replace(silent);
        }
        self.first = false;
    }

    fn tell_turns(&self, before: &Nodes, now: &Nodes) {
        let fallen = now.iter().filter(|(name, _)| !before.contains_key(*name)).map(|one| (one, true));
        let back = before.iter().filter(|(name, _)| !now.contains_key(*name)).map(|one| (one, false));
        for ((node, address), silent) in fallen.chain(back) {
            if silent {
                tracing::warn!(%node, %address, "node doesn't answer: its endpoints are left out");
            } else {
                tracing::info!(%node, %address, "node answers, or is gone: none of its endpoints is left out");
            }
            // An Event from each of a thousand nodes would be too many.
            if let Some(turns) = self.told.turns.as_ref()
                && !self.first
                && self.detector.watches(*address)
            {
                let turn = Turn { node: Arc::clone(node), address: *address, silent };
                // Behind a queue that is full, the log and the metric have it.
                let _ = turns.try_send(turn);
            }
        }
    }
}

async fn listen() -> io::Result<UdpSocket> {
    match UdpSocket::bind((Ipv6Addr::UNSPECIFIED, PORT)).await {
        Err(error) if error.kind() != io::ErrorKind::AddrInUse => {
            UdpSocket::bind((Ipv4Addr::UNSPECIFIED, PORT)).await
        }
        outcome => outcome,
    }
}

/// Where hints are heard. A socket of both families wants IPv4 addresses in IPv6's form.
fn at(address: IpAddr, of_both: bool) -> SocketAddr {
    match address {
        IpAddr::V4(ip) if of_both => SocketAddr::new(ip.to_ipv6_mapped().into(), PORT),
        IpAddr::V4(_) | IpAddr::V6(_) => SocketAddr::new(address, PORT),
    }
}

/// The next hint and its sender; `None` for what is none. Cancel safe.
async fn receive(socket: Option<&UdpSocket>) -> Option<(IpAddr, SocketAddr)> {
    let Some(socket) = socket else { return std::future::pending().await };
    let mut bytes = [0; HINT_BYTES + 1];
    match socket.recv_from(&mut bytes).await {
        Ok((count, from)) => Some((decode(bytes.get(..count)?)?, from)),
        Err(error) => {
            tracing::debug!(%error, "cannot hear a hint");
            None
        }
    }
}

fn encode(about: IpAddr) -> [u8; HINT_BYTES] {
    let mut packet = [0; HINT_BYTES];
    let address = match about {
        IpAddr::V4(ip) => ip.to_ipv6_mapped(),
        IpAddr::V6(ip) => ip,
    };
    packet[..8].copy_from_slice(&MAGIC);
    packet[8..].copy_from_slice(&address.octets());
    packet
}

fn decode(packet: &[u8]) -> Option<IpAddr> {
    let address: [u8; 16] = packet.strip_prefix(&MAGIC)?.try_into().ok()?;
    Some(IpAddr::from(address).to_canonical())
}

/// The gateway of the default route.
fn gateway(v6: bool) -> Option<IpAddr> {
    let elsewhere: IpAddr = if v6 { ELSEWHERE_V6.into() } else { ELSEWHERE_V4.into() };
    let route = Netlink::open().and_then(|mut netlink| netlink.route_to(elsewhere));
    match route {
        Ok(route) => route.and_then(|route| route.gateway),
        Err(error) => {
            tracing::debug!(%error, "cannot find the default route");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hint_is_read_as_it_was_written_and_nothing_else_is() {
        for text in ["10.44.0.2", "fd44::2"] {
            let ip: IpAddr = text.parse().unwrap();
            assert_eq!(decode(&encode(ip)), Some(ip));
        }
        let mut longer = encode(IpAddr::V4(ELSEWHERE_V4)).to_vec();
        longer.push(0);
        assert_eq!(decode(&longer), None);
        assert_eq!(decode(&longer[..23]), None);
        assert_eq!(decode(b"hello"), None);
    }
}
