//! ADD: leases, bridge, veth pair, addresses, routes; undone in reverse if a step fails.

use std::fs::File;
use std::net::IpAddr;
use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use ipnetwork::IpNetwork;
use weft_cni_ipam::{Acquired, Owner};
use weft_cni_netlink::{
    Batch, Class, Link, LinkChange, Mac, Neighbour, Netlink, Offloads, Route, VethEnd, namespace, sysctl,
};
use weft_cni_spec::{AddResult, Bandwidth, Call, Config, Fabric, Interface, IpConfig, Range};

use crate::capabilities::{self, Ends};
use crate::error::PluginError;
use crate::{detach, leases, names, pools};

/// What this call has made, for undoing it.
struct Made {
    leases: Vec<Acquired>,
    pair: bool,
    ports: bool,
}

/// An address of the pod, and the range that it is of.
#[derive(Clone, Copy)]
struct Placed {
    range: Range,
    address: IpAddr,
}

impl Placed {
    /// Everything of the address's family.
    fn everywhere(&self) -> IpNetwork {
        everywhere(self.address)
    }
}

/// One attachment while it is being made.
struct Attachment<'a> {
    config: &'a Config,
    fabric: &'a Fabric,
    owner: &'a Owner,
    addresses: Vec<Placed>,
    mac: Mac,
    host_name: String,
    netns: File,
    sandbox: String,
}

pub(crate) fn add(
    call: &Call,
    config: &Config,
    fabric: &Fabric,
    owner: &Owner,
) -> Result<AddResult, PluginError> {
    if config.prev_result.is_some() {
        return Err(PluginError::NotFirst);
    }
    let path = call.netns.as_deref().ok_or(PluginError::Missing("CNI_NETNS"))?;
    let netns =
        namespace::open(path).map_err(|source| PluginError::Netns { path: path.to_path_buf(), source })?;
    let mut wanted: Vec<IpAddr> = config.runtime.ips.iter().map(IpNetwork::ip).collect();
    wanted.extend(call.args.ips.iter().filter(|ip| !config.runtime.ips.iter().any(|one| one.ip() == **ip)));
    let acquired = leases(config)?.acquire(&pools(fabric), owner, &wanted)?;
    let placed = fabric.ipam.ranges.iter().zip(&acquired);
    let mac = config.runtime.mac.or(call.args.mac).map(|mac| Mac(mac.0));
    let attachment = Attachment {
        config,
        fabric,
        owner,
        addresses: placed.map(|(range, one)| Placed { range: *range, address: one.address }).collect(),
        mac: mac.unwrap_or_else(|| names::mac(acquired.iter().map(|one| one.address))),
        host_name: names::host_interface(&config.name, owner),
        netns,
        sandbox: path.display().to_string(),
    };
    let mut made = Made { leases: acquired, pair: false, ports: false };
    attachment.make(&mut made).map_err(|failed| match attachment.undo(&made) {
        Ok(()) => failed,
        Err(source) => PluginError::Undo { failed: Box::new(failed), source: Box::new(source) },
    })
}

impl Attachment<'_> {
    fn make(&self, made: &mut Made) -> Result<AddResult, PluginError> {
        let mut host = Netlink::open()?;
        let bridge = self.bridge(&mut host)?;
        let mtu_bytes = self.fabric.mtu_bytes;
        let ends = (
            VethEnd { name: &self.host_name, mac: None, mtu_bytes },
            VethEnd { name: &self.owner.ifname, mac: Some(self.mac), mtu_bytes },
        );
        let port = host.create_veth_port(&ends.0, &ends.1, Some(self.netns.as_fd()), Some(bridge.index))?;
        made.pair = true;
        let port = match port {
            Some(port) => port,
            None => host.link(&self.host_name)?,
        };
        let mut pod = self.configure_pod(&host, &port, &bridge)?;
        self.configure_port(&mut host, &port, &bridge)?;
        self.add_capabilities(&mut host, &port, &mut pod, made)?;
        Ok(self.result(&bridge, &port))
    }

    /// The host's end, behind the pod's: it carries nothing before that one does.
    fn configure_port(&self, host: &mut Netlink, port: &Link, bridge: &Link) -> Result<(), PluginError> {
        let mut batch = Batch::default().make_pod_port(port.index);
        // Both sides know each other from the start: no packet waits for an answer, and none is lost.
        for placed in &self.addresses {
            let pod = Neighbour { index: bridge.index, address: placed.address, mac: self.mac };
            batch = batch.put_neighbour(&pod);
        }
        batch = batch.link(&self.host_name);
        // One that ran before has other ports.
        if !bridge.running {
            batch = batch.link(&bridge.name);
        }
        let links = host.apply(batch)?;
        links.into_iter().try_for_each(|link| wait_until_running(host, &link))
    }

    /// The node's bridge, made if it is missing, with the gateways' addresses on it.
    fn bridge(&self, host: &mut Netlink) -> Result<Link, PluginError> {
        let name = &self.fabric.bridge;
        let mut bridge = match host.link(name) {
            Err(error) if error.class() == Class::NotFound => {
                host.ensure_bridge(name, self.fabric.mtu_bytes)?
            }
            other => other?,
        };
        let gateways = self.fabric.ipam.ranges.iter().map(|range| range.gateway);
        // Unless it is set, a bridge takes the lowest of its ports' addresses, and changes it with them.
        let mac = names::mac(gateways);
        // Likewise its size: without this it is that of Ethernet whenever it has no port.
        let mtu_bytes = self.fabric.mtu_bytes;
        if bridge.mac != Some(mac) || bridge.mtu_bytes != mtu_bytes || !bridge.up {
            // First, as what follows is how the next ADD sees that all is done.
            sysctl::refuse_routers(name)?;
            let (mac, mtu_bytes) = (Some(mac), Some(mtu_bytes));
            host.change_link(
                bridge.index,
                &LinkChange { up: Some(true), mac, mtu_bytes, ..LinkChange::default() },
            )?;
            bridge.mac = mac;
        }
        for range in &self.fabric.ipam.ranges {
            if range.subnet.is_ipv4() {
                sysctl::forward_ipv4()?;
            } else {
                sysctl::forward_ipv6()?;
            }
            host.add_address(bridge.index, range.network(range.gateway))?;
        }
        Ok(bridge)
    }

    fn configure_pod(&self, host: &Netlink, port: &Link, bridge: &Link) -> Result<Netlink, PluginError> {
        let own = host.namespace()?;
        let (mut pod, offloads) = namespace::during_from(own.as_fd(), self.netns.as_fd(), || {
            self.switch_pod()?;
            Ok::<_, weft_cni_netlink::Error>((Netlink::open()?, Offloads::open()?))
        })??;
        let index = match port.peer_index {
            Some(index) => index,
            None => pod.link(&self.owner.ifname)?.index,
        };
        // The flags that a peer is made with don't set it up in another namespace.
        let up = LinkChange { up: Some(true), ..LinkChange::default() };
        let mut batch = Batch::default().change_link(index, &up);
        for placed in &self.addresses {
            let gateway = placed.range.gateway;
            batch = batch.add_address(index, placed.range.network(placed.address));
            if let Some(mac) = bridge.mac {
                batch = batch.put_neighbour(&Neighbour { index, address: gateway, mac });
            }
            let out = Route { gateway: Some(gateway), ..Route::new(placed.everywhere(), index) };
            batch = batch.put_route(&out);
        }
        let links = pod.apply(batch.link(&self.owner.ifname))?;
        // Once it is up: earlier, the node's end would not know of it. XDP hands frames to no pod without.
        offloads.receive_in_batches(&self.owner.ifname, true)?;
        for placed in &self.addresses {
            pod.await_address(placed.range.network(placed.address))?;
        }
        links.into_iter().try_for_each(|link| wait_until_running(&mut pod, &link))?;
        Ok(pod)
    }

    /// Last, as they lead packets to a pod that must be able to answer.
    fn add_capabilities(
        &self,
        host: &mut Netlink,
        port: &Link,
        pod: &mut Netlink,
        made: &mut Made,
    ) -> Result<(), PluginError> {
        let asked = &self.config.runtime;
        if asked.bandwidth != Bandwidth::default() {
            let inside = pod.link(&self.owner.ifname)?;
            let mut ends = Ends { host, port: Some(port), pod, inside: &inside };
            capabilities::shape(self.config, &mut ends)?;
        }
        made.ports = !asked.ports.is_empty();
        let addresses: Vec<IpAddr> = self.addresses.iter().map(|placed| placed.address).collect();
        capabilities::map_ports(self.config, self.owner, &addresses, &self.fabric.bridge)
    }

    /// The switches of the pod's end, before it is set up; within the pod's namespace.
    fn switch_pod(&self) -> Result<(), weft_cni_netlink::Error> {
        let name = &self.owner.ifname;
        // On IPv4 too: else another pod's announcements give this one an address and a route.
        sysctl::refuse_routers_anew(name)?;
        if self.addresses.iter().any(|placed| placed.address.is_ipv6()) {
            sysctl::use_ipv6(name)?;
        }
        Ok(())
    }

    fn result(&self, bridge: &Link, port: &Link) -> AddResult {
        let interface = |name: &str, mac: String, sandbox: Option<String>| Interface {
            name: name.to_owned(),
            mac,
            mtu_bytes: self.fabric.mtu_bytes,
            sandbox,
        };
        let written = |link: &Link| link.mac.map(|mac| mac.to_string()).unwrap_or_default();
        let ip = |placed: &Placed| IpConfig {
            address: placed.range.network(placed.address),
            gateway: placed.range.gateway,
            interface: 2,
        };
        let route = |placed: &Placed| weft_cni_spec::Route {
            destination: placed.everywhere(),
            gateway: placed.range.gateway,
        };
        AddResult {
            interfaces: vec![
                interface(&bridge.name, written(bridge), None),
                interface(&port.name, written(port), None),
                interface(&self.owner.ifname, self.mac.to_string(), Some(self.sandbox.clone())),
            ],
            ips: self.addresses.iter().map(ip).collect(),
            routes: self.addresses.iter().map(route).collect(),
            dns: self.config.dns.clone(),
        }
    }

    /// Takes back what this call has made, and nothing that was there before.
    fn undo(&self, made: &Made) -> Result<(), PluginError> {
        if made.ports {
            capabilities::unmap_ports(&leases(self.config)?, self.owner)?;
        }
        if made.pair {
            let addresses: Vec<IpAddr> = self.addresses.iter().map(|placed| placed.address).collect();
            detach::unlink(self.config, self.fabric, self.owner, &addresses)?;
        }
        Ok(leases(self.config)?.give_back(&made.leases)?)
    }
}

/// Waits until a device carries packets. Before that it drops them, and a pod's first ones would be lost.
///
/// Linux since 6.8 does what is missing when it is asked; an older one takes up to a second.
fn wait_until_running(netlink: &mut Netlink, found: &Link) -> Result<(), PluginError> {
    const DEADLINE: Duration = Duration::from_secs(3);
    const PAUSE: Duration = Duration::from_millis(2);
    let begun = Instant::now();
    let mut running = found.running;
    while !running {
        if begun.elapsed() > DEADLINE {
            return Err(PluginError::NotRunning(found.name.clone()));
        }
        #[expect(
            clippy::disallowed_methods,
            reason = "the only thread of a short process, and nothing else to do"
        )]
        std::thread::sleep(PAUSE);
        running = netlink.link(&found.name)?.running;
    }
    Ok(())
}

/// Where a default route leads.
pub(crate) fn everywhere(of: IpAddr) -> IpNetwork {
    let unspecified: IpAddr = match of {
        IpAddr::V4(_) => std::net::Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => std::net::Ipv6Addr::UNSPECIFIED.into(),
    };
    // A prefix of no bits is one.
    IpNetwork::new(unspecified, 0).unwrap_or_else(|_| IpNetwork::from(unspecified))
}
