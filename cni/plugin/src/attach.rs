//! ADD: lease, bridge, veth pair, address, route; undone in reverse if a step fails.

use std::fs::{self, File};
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use ipnetwork::Ipv4Network;
use weft_cni_ipam::Owner;
use weft_cni_netlink::{Class, Link, LinkChange, Neighbour, Netlink, Route, VethEnd, namespace};
use weft_cni_spec::{AddResult, Call, Config, Interface, IpConfig};

use crate::error::PluginError;
use crate::{detach, leases, names, pool};

/// The switch of the calling thread's namespace.
const FORWARDING: &str = "/proc/sys/net/ipv4/ip_forward";

/// Where the default route leads: 0.0.0.0/0.
const EVERYWHERE: Ipv4Network = match Ipv4Network::new_checked(Ipv4Addr::UNSPECIFIED, 0) {
    Some(network) => network,
    None => panic!("a prefix of no bits is one"),
};

/// What this call has made, for undoing it.
#[derive(Default)]
struct Made {
    lease: bool,
    pair: bool,
}

/// One attachment while it is being made.
struct Attachment<'a> {
    config: &'a Config,
    owner: &'a Owner,
    address: Ipv4Addr,
    host_name: String,
    netns: File,
    sandbox: String,
}

pub(crate) fn add(call: &Call, config: &Config, owner: &Owner) -> Result<AddResult, PluginError> {
    let path = call.netns.as_deref().ok_or(PluginError::Missing("CNI_NETNS"))?;
    let netns =
        namespace::open(path).map_err(|source| PluginError::Netns { path: path.to_path_buf(), source })?;
    let wanted = config.runtime.ips.iter().find_map(|ip| match ip.ip() {
        IpAddr::V4(address) => Some(address),
        IpAddr::V6(_) => None,
    });
    // The lock is let go at once: the kernel serves several ADDs at the same time.
    let acquired = leases(config)?.acquire(&pool(config), owner, wanted)?;
    let attachment = Attachment {
        config,
        owner,
        address: acquired.address,
        host_name: names::host_interface(&config.name, owner),
        netns,
        sandbox: path.display().to_string(),
    };
    let mut made = Made { lease: acquired.fresh, pair: false };
    attachment.make(&mut made).map_err(|failed| match attachment.undo(&made) {
        Ok(()) => failed,
        Err(source) => PluginError::Undo { failed: Box::new(failed), source: Box::new(source) },
    })
}

impl Attachment<'_> {
    fn make(&self, made: &mut Made) -> Result<AddResult, PluginError> {
        let mut host = Netlink::open()?;
        let bridge = self.bridge(&mut host)?;
        let mtu_bytes = self.config.mtu_bytes;
        let pod_mac = names::mac(self.address);
        let ends = (
            VethEnd { name: &self.host_name, mac: None, mtu_bytes },
            VethEnd { name: &self.owner.ifname, mac: Some(pod_mac), mtu_bytes },
        );
        host.create_veth_port(&ends.0, &ends.1, Some(self.netns.as_fd()), Some(bridge.index))?;
        made.pair = true;
        let port = host.link(&self.host_name)?;
        host.set_hairpin(port.index, true)?;
        // Both sides know each other from the start: no packet waits for ARP, and none is lost.
        let pod = Neighbour { index: bridge.index, address: self.address.into(), mac: pod_mac };
        host.put_neighbour(&pod)?;
        self.configure_pod(&port, &bridge)?;
        // From the pod outwards, as each depends on the one before.
        wait_until_running(&mut host, &self.host_name)?;
        wait_until_running(&mut host, &self.config.bridge)?;
        Ok(self.result(&bridge, &port))
    }

    /// The node's bridge, made if it is missing, with the gateway's address on it.
    fn bridge(&self, host: &mut Netlink) -> Result<Link, PluginError> {
        let name = &self.config.bridge;
        let mut bridge = match host.link(name) {
            Err(error) if error.class() == Class::NotFound => {
                host.ensure_bridge(name, self.config.mtu_bytes)?
            }
            other => other?,
        };
        // Unless it is set, a bridge takes the lowest of its ports' addresses, and changes it with them.
        let mac = names::mac(self.config.ipam.gateway);
        // Likewise its size: without this it is that of Ethernet whenever it has no port.
        let mtu_bytes = self.config.mtu_bytes;
        if bridge.mac != Some(mac) || bridge.mtu_bytes != mtu_bytes || !bridge.up {
            let (mac, mtu_bytes) = (Some(mac), Some(mtu_bytes));
            host.change_link(
                bridge.index,
                &LinkChange { up: Some(true), mac, mtu_bytes, ..LinkChange::default() },
            )?;
        }
        if bridge.mac != Some(mac) {
            bridge.mac = Some(mac);
        }
        host.add_address(bridge.index, self.network(self.config.ipam.gateway).into())?;
        turn_on_forwarding().map_err(|source| PluginError::Forwarding { source })?;
        Ok(bridge)
    }

    fn configure_pod(&self, port: &Link, bridge: &Link) -> Result<(), PluginError> {
        let mut pod = Netlink::open_within(self.netns.as_fd())?;
        let index = match port.peer_index {
            Some(index) => index,
            None => pod.link(&self.owner.ifname)?.index,
        };
        let gateway = IpAddr::V4(self.config.ipam.gateway);
        // The flags that a peer is made with don't set it up in another namespace.
        pod.change_link(index, &LinkChange { up: Some(true), ..LinkChange::default() })?;
        pod.add_address(index, self.network(self.address).into())?;
        if let Some(mac) = bridge.mac {
            pod.put_neighbour(&Neighbour { index, address: gateway, mac })?;
        }
        pod.put_route(&Route { gateway: Some(gateway), ..Route::new(EVERYWHERE.into(), index) })?;
        wait_until_running(&mut pod, &self.owner.ifname)
    }

    fn network(&self, address: Ipv4Addr) -> Ipv4Network {
        let subnet = self.config.ipam.subnet;
        // The prefix is one that a subnet has already.
        Ipv4Network::new(address, subnet.prefix()).unwrap_or(subnet)
    }

    fn result(&self, bridge: &Link, port: &Link) -> AddResult {
        let interface = |name: &str, mac: String, sandbox: Option<String>| Interface {
            name: name.to_owned(),
            mac,
            mtu_bytes: self.config.mtu_bytes,
            sandbox,
        };
        let written = |link: &Link| link.mac.map(|mac| mac.to_string()).unwrap_or_default();
        let gateway = self.config.ipam.gateway;
        AddResult {
            interfaces: vec![
                interface(&bridge.name, written(bridge), None),
                interface(&port.name, written(port), None),
                interface(
                    &self.owner.ifname,
                    names::mac(self.address).to_string(),
                    Some(self.sandbox.clone()),
                ),
            ],
            ips: vec![IpConfig { address: self.network(self.address), gateway, interface: 2 }],
            routes: vec![weft_cni_spec::Route { destination: EVERYWHERE, gateway }],
        }
    }

    /// Takes back what this call has made, and nothing that was there before.
    fn undo(&self, made: &Made) -> Result<(), PluginError> {
        if made.pair {
            detach::unlink(self.config, self.owner, &[self.address])?;
        }
        if made.lease {
            leases(self.config)?.release(self.owner)?;
        }
        Ok(())
    }
}

/// Waits until a device carries packets. Before that it drops them, and a pod's first ones would be lost.
///
/// Linux since 6.8 does what is missing when it is asked; an older one takes up to a second.
fn wait_until_running(netlink: &mut Netlink, name: &str) -> Result<(), PluginError> {
    const DEADLINE: Duration = Duration::from_secs(3);
    const PAUSE: Duration = Duration::from_millis(2);
    let begun = Instant::now();
    while !netlink.link(name)?.running {
        if begun.elapsed() > DEADLINE {
            return Err(PluginError::NotRunning(name.to_owned()));
        }
        #[expect(
            clippy::disallowed_methods,
            reason = "the only thread of a short process, and nothing else to do"
        )]
        std::thread::sleep(PAUSE);
    }
    Ok(())
}

fn turn_on_forwarding() -> io::Result<()> {
    if fs::read(FORWARDING)?.first() == Some(&b'1') {
        return Ok(());
    }
    fs::write(FORWARDING, "1")
}
