//! The node's link as the election sees it: questions, announcements and what is heard, by ARP and by neighbour discovery.

use std::io;
use std::net::{IpAddr, Ipv4Addr};

use weft_cni_netlink::{Class, Link as Device, Mac, Netlink};

use super::Error;
use super::arp::{ArpSocket, Frame};
use super::ndp::{self, NdpSocket};

/// The link that the node's own address is on.
#[derive(Debug)]
pub(super) struct Link {
    /// Who asks by ARP; the unspecified address if the node has none of IPv4 (RFC 5227's probe).
    asker: Ipv4Addr,
    mac: Mac,
    device: Device,
    arp: ArpSocket,
    /// `None` on a kernel without IPv6.
    ndp: Option<NdpSocket>,
}

impl Link {
    /// Finds the device that has this address, and opens sockets on it.
    pub(super) fn open(netlink: &mut Netlink, node_ip: IpAddr) -> Result<Self, Error> {
        let address = netlink.addresses()?.into_iter().find(|a| a.network.ip() == node_ip);
        let index = address.ok_or(Error::NoUplink(node_ip))?.index;
        let device = netlink.links()?.into_iter().find(|link| link.index == index && !link.loopback);
        let device = device.ok_or(Error::NoUplink(node_ip))?;
        let mac = device.mac.ok_or(Error::NoUplink(node_ip))?;
        let failed = |protocol| {
            let device = device.name.clone();
            move |source| Error::Speak { op: "open", protocol, device, source }
        };
        let arp = ArpSocket::open(index).map_err(failed(ARP))?;
        let ndp = match NdpSocket::open(index, &device.name) {
            Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => None,
            opened => Some(opened.map_err(failed(NDP))?),
        };
        let asker = match node_ip {
            IpAddr::V4(own) => own,
            IpAddr::V6(_) => Ipv4Addr::UNSPECIFIED,
        };
        Ok(Self { asker, mac, device, arp, ndp })
    }

    /// The node's hardware address there.
    pub(super) fn mac(&self) -> Mac {
        self.mac
    }

    /// The device.
    pub(super) fn device(&self) -> &Device {
        &self.device
    }

    /// Asks who has an address: one node by ARP if it is named, else all that may have it.
    pub(super) async fn ask(&self, address: IpAddr, of: Option<Mac>) -> Result<(), Error> {
        match address {
            IpAddr::V4(address) => {
                let frame = Frame::request(self.mac, self.asker, address);
                self.sent(ARP, self.arp.send(&frame, of).await)
            }
            IpAddr::V6(address) => {
                let Some(socket) = &self.ndp else { return Ok(()) };
                let message = ndp::solicitation(self.mac, address);
                self.sent(NDP, socket.send(&message, ndp::solicited_node(address)).await)
            }
        }
    }

    /// Tells everybody that an address is here.
    pub(super) async fn announce(&self, address: IpAddr) -> Result<(), Error> {
        match address {
            IpAddr::V4(address) => {
                let frame = Frame::announcement(self.mac, address);
                self.sent(ARP, self.arp.send(&frame, None).await)
            }
            IpAddr::V6(address) => {
                let Some(socket) = &self.ndp else { return Ok(()) };
                let message = ndp::advertisement(self.mac, address);
                self.sent(NDP, socket.send(&message, ndp::ALL_NODES).await)
            }
        }
    }

    /// The next word on who has an address; `None` for one that says nothing. Cancel safe.
    pub(super) async fn hear(&self) -> Result<Option<(IpAddr, Mac)>, Error> {
        let neighbours = async {
            match &self.ndp {
                Some(socket) => socket.receive().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            frame = self.arp.receive() => {
                let frame = frame.map_err(self.failed("receive", ARP))?;
                Ok(frame.map(|frame| (frame.sender.into(), frame.sender_mac)))
            }
            said = neighbours => {
                let said = said.map_err(self.failed("receive", NDP))?;
                Ok(said.map(|(address, mac)| (address.into(), mac)))
            }
        }
    }

    /// Has the kernel answer for an address of another device, or not any more. For IPv4 it does by itself.
    pub(super) fn answer(&self, netlink: &mut Netlink, address: IpAddr, on: bool) -> Result<(), Error> {
        if address.is_ipv4() {
            return Ok(());
        }
        if !on {
            return Ok(netlink.delete_proxy(self.device.index, address)?);
        }
        weft_cni_netlink::sysctl::answer_for_proxies(&self.device.name)?;
        Ok(netlink.put_proxy(self.device.index, address)?)
    }

    fn sent(&self, protocol: &'static str, outcome: io::Result<()>) -> Result<(), Error> {
        match outcome {
            // The link is down, or has no address of its own yet: the others find out by the silence.
            Err(error) if is_of_the_link(&error) => Ok(()),
            sent => sent.map_err(self.failed("send", protocol)),
        }
    }

    fn failed(&self, op: &'static str, protocol: &'static str) -> impl FnOnce(io::Error) -> Error + use<> {
        let device = self.device.name.clone();
        move |source| Error::Speak { op, protocol, device, source }
    }
}

const ARP: &str = "ARP";
const NDP: &str = "neighbour discovery";

fn is_of_the_link(error: &io::Error) -> bool {
    let known = [libc::ENETDOWN, libc::ENOBUFS, libc::EADDRNOTAVAIL, libc::ENETUNREACH];
    error.raw_os_error().is_some_and(|code| known.contains(&code))
}

/// The addresses of a device of this name; none if there is no such device.
pub(super) fn addresses_on(netlink: &mut Netlink, name: &str) -> Result<Vec<IpAddr>, Error> {
    let device = match netlink.link(name) {
        Ok(device) => device,
        Err(error) if error.class() == Class::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error.into()),
    };
    let addresses = netlink.addresses()?.into_iter().filter(|a| a.index == device.index && a.global);
    Ok(addresses.map(|address| address.network.ip()).collect())
}
