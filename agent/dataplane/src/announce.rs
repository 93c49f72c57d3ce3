//! Answers for load-balancer addresses on the node's link: one node holds each address, and when it falls silent another takes it.
//!
//! A holder has the address on a device of its own ([`DEVICE`]), so its kernel answers ARP for it, also while the agent is away.
//! The others ask for the address by ARP several times a second; one that hears nothing for a second takes it and says so by
//! gratuitous ARP. No node needs to know which others there are. IPv4 only.

pub(crate) mod answers;
mod arp;
mod election;
#[doc(hidden)]
pub mod fuzz;
mod socket;

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use ipnetwork::Ipv4Network;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use weft_cni_netlink::{Class, Mac, Netlink};

use self::arp::{Frame, Operation};
use self::election::{Action, Election};
use self::socket::ArpSocket;

/// The device that carries the addresses: a bridge without ports.
pub const DEVICE: &str = "weft.lb";
/// Class of Services whose load balancer weft is, beside those of no class.
pub(crate) const CLASS: &str = "weft.dev/pool";
/// It never carries a packet; this is Ethernet's usual size.
const MTU_BYTES: u32 = 1500;

/// A device that comes and goes is tried again after this.
const RETRY: Duration = Duration::from_secs(1);

/// Why addresses can't be announced.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel refused a change of devices or addresses.
    #[error(transparent)]
    Netlink(#[from] weft_cni_netlink::Error),
    /// No device has the node's address, or it is none of Ethernet.
    #[error("no Ethernet device has the node's address {0}, so load-balancer addresses can't be announced")]
    NoUplink(Ipv4Addr),
    /// ARP can't be spoken.
    #[error("cannot {op} ARP on {device}")]
    Arp {
        /// `open`, `send` or `receive`.
        op: &'static str,
        /// The device.
        device: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// Holds those of the `wanted` addresses that no other node answers for, until `shutdown`. Addresses stay where they are
/// afterwards; [`cleanup`] takes them away.
///
/// # Errors
/// If the node's device can't be used, or the kernel refuses an address.
pub async fn run(
    node_ip: Ipv4Addr,
    mut wanted: watch::Receiver<BTreeSet<Ipv4Addr>>,
    shutdown: CancellationToken,
) -> Result<(), Error> {
    // A cluster without load balancers has neither socket nor device.
    let some = async { wanted.wait_for(|addresses| !addresses.is_empty()).await.is_ok() };
    if !shutdown.run_until_cancelled(some).await.unwrap_or(false) {
        return Ok(());
    }
    let mut announcer = Announcer::open(node_ip)?;
    wanted.mark_changed();
    loop {
        let now = Instant::now();
        let (actions, next) = announcer.election.due(now);
        announcer.apply(&actions).await?;
        tokio::select! {
            () = shutdown.cancelled() => return Ok(()),
            changed = wanted.changed() => {
                if changed.is_err() {
                    return Ok(());
                }
                let actions = announcer.election.want(&wanted.borrow_and_update().clone(), Instant::now());
                announcer.apply(&actions).await?;
            }
            frame = announcer.socket.receive() => {
                let frame = frame.map_err(announcer.failed("receive"))?;
                if let Some(frame) = frame {
                    let actions = announcer.election.heard(frame.sender, frame.sender_mac, Instant::now());
                    announcer.apply(&actions).await?;
                }
            }
            () = tokio::time::sleep_until(next.into()) => {}
        }
    }
}

/// Runs [`run`] again when it fails, until `shutdown`: Services go on without their load balancer. Addresses of IPv6 nodes
/// are not announced.
pub(crate) async fn keep_running(
    node_ip: IpAddr,
    wanted: watch::Receiver<BTreeSet<Ipv4Addr>>,
    shutdown: CancellationToken,
) {
    let IpAddr::V4(node_ip) = node_ip else { return shutdown.cancelled().await };
    while let Err(error) = run(node_ip, wanted.clone(), shutdown.clone()).await {
        tracing::warn!(%error, source = ?std::error::Error::source(&error), "load-balancer addresses are not announced");
        if shutdown.run_until_cancelled(tokio::time::sleep(RETRY)).await.is_none() {
            return;
        }
    }
    shutdown.cancelled().await;
}

/// Removes the device, and with it every address that this node holds. What is gone already is no error.
///
/// # Errors
/// If the kernel refuses.
pub fn cleanup() -> Result<(), Error> {
    Ok(Netlink::open()?.delete_link_named(DEVICE)?)
}

struct Announcer {
    node_ip: Ipv4Addr,
    uplink: String,
    socket: ArpSocket,
    election: Election,
}

impl Announcer {
    fn open(node_ip: Ipv4Addr) -> Result<Self, Error> {
        let mut netlink = Netlink::open()?;
        let address = netlink.addresses()?.into_iter().find(|a| a.network.ip() == IpAddr::V4(node_ip));
        let address = address.ok_or(Error::NoUplink(node_ip))?;
        let links = netlink.links()?;
        let uplink = links.into_iter().find(|link| link.index == address.index && !link.loopback);
        let uplink = uplink.ok_or(Error::NoUplink(node_ip))?;
        let mac = uplink.mac.ok_or(Error::NoUplink(node_ip))?;
        let opened = ArpSocket::open(uplink.index);
        let socket =
            opened.map_err(|source| Error::Arp { op: "open", device: uplink.name.clone(), source })?;
        let held = held(&mut netlink)?;
        Ok(Self { node_ip, uplink: uplink.name, socket, election: Election::new(mac, held, Instant::now()) })
    }

    fn failed(&self, op: &'static str) -> impl FnOnce(io::Error) -> Error + use<> {
        let device = self.uplink.clone();
        move |source| Error::Arp { op, device, source }
    }

    async fn apply(&mut self, actions: &[Action]) -> Result<(), Error> {
        for action in actions {
            match *action {
                Action::Ask(address, holder) => {
                    let frame = Frame::request(self.election.own(), self.node_ip, address);
                    self.send(&frame, holder).await?;
                }
                Action::Take(address) => {
                    let mut netlink = Netlink::open()?;
                    let device = netlink.ensure_bridge(DEVICE, MTU_BYTES)?;
                    netlink.add_address(device.index, Ipv4Network::from(address).into())?;
                    tracing::info!(%address, device = self.uplink, "answering for the load-balancer address");
                }
                Action::Announce(address) => {
                    let frame = Frame::announcement(self.election.own(), address);
                    self.send(&frame, None).await?;
                }
                Action::Give(address) => {
                    give(address)?;
                    tracing::info!(%address, "no longer answering for the load-balancer address");
                }
            }
        }
        Ok(())
    }

    async fn send(&self, frame: &Frame, to: Option<Mac>) -> Result<(), Error> {
        match self.socket.send(frame, to).await {
            // The link is down: the others find out by the silence.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENETDOWN | libc::ENOBUFS)) => Ok(()),
            sent => sent.map_err(self.failed("send")),
        }
    }
}

/// The addresses that an earlier agent took.
fn held(netlink: &mut Netlink) -> Result<BTreeSet<Ipv4Addr>, Error> {
    let device = match netlink.link(DEVICE) {
        Ok(device) => device,
        Err(error) if error.class() == Class::NotFound => return Ok(BTreeSet::new()),
        Err(error) => return Err(error.into()),
    };
    let addresses = netlink.addresses()?.into_iter().filter(|a| a.index == device.index);
    Ok(addresses
        .filter_map(|a| match a.network.ip() {
            IpAddr::V4(ip) => Some(ip),
            IpAddr::V6(_) => None,
        })
        .collect())
}

fn give(address: Ipv4Addr) -> Result<(), Error> {
    let mut netlink = Netlink::open()?;
    match netlink.link(DEVICE) {
        Ok(device) => Ok(netlink.delete_address(device.index, Ipv4Network::from(address).into())?),
        Err(error) if error.class() == Class::NotFound => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Whether a frame says who has an address: a reply, or a request from the address itself (RFC 5227's announcement).
fn tells(frame: &Frame) -> bool {
    match frame.operation {
        Operation::Reply => true,
        Operation::Request => frame.sender == frame.target,
    }
}
