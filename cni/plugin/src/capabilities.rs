//! What the caller may ask for beyond an interface: ports of the node, bounds on traffic. The same for pods that this plugin
//! has attached and, in chained use, for those of another.

use std::collections::HashSet;
use std::net::IpAddr;

use weft_cni_ipam::{Leases, Mapped, Owner};
use weft_cni_netlink::hostport::{self, HostPort};
use weft_cni_netlink::{Class, Link, Netlink, Shape, sysctl};
use weft_cni_spec::{Config, PortMapping, Protocol, Rate};

use crate::error::PluginError;
use crate::leases;

/// How long what waits for its turn may wait, at most; as the reference has it.
const LATENCY_MS: u64 = 25;
/// Where the caller names no burst: what the rate gives in this time, and no less than two large sends.
const BURST_MS: u64 = 20;
const LEAST_BURST_BYTES: u64 = 128 << 10;
/// What a packet has before its IP header.
const LINK_HEADER_BYTES: u32 = 18;

/// A pod's interface, seen from both sides.
pub(crate) struct Ends<'a> {
    pub(crate) host: &'a mut Netlink,
    /// `None` if the pod's interface has no other end on the host.
    pub(crate) port: Option<&'a Link>,
    pub(crate) pod: &'a mut Netlink,
    pub(crate) inside: &'a Link,
}

/// Makes ports of the node lead to a pod's addresses, which are reached by a device.
pub(crate) fn map_ports(
    config: &Config,
    owner: &Owner,
    addresses: &[IpAddr],
    device: &str,
) -> Result<(), PluginError> {
    let ports = host_ports(&config.runtime.ports, addresses);
    if ports.is_empty() {
        return Ok(());
    }
    let leases = leases(config)?;
    let locked = leases.lock()?;
    let to: HashSet<IpAddr> = ports.iter().map(|port| port.pod).collect();
    for address in to {
        let mapped = Mapped { address, device: device.to_owned(), owner: owner.clone() };
        leases.note_mapped(&mapped, &locked)?;
    }
    // The guard against others that would use loopback addresses comes with the table; where it is the first, it is there
    // before the switch.
    hostport::add(&ports, device).map_err(|error| {
        if error.class() == Class::Exists {
            PluginError::PortTaken(described(&config.runtime.ports))
        } else {
            error.into()
        }
    })?;
    if ports.iter().any(|port| port.pod.is_ipv4()) {
        sysctl::route_loopback(device)?;
    }
    Ok(())
}

/// Removes what led to an owner's addresses. Nothing is no error.
pub(crate) fn unmap_ports(leases: &Leases, owner: &Owner) -> Result<(), PluginError> {
    let of = |mapped: Vec<Mapped>| mapped.into_iter().filter(|one| one.owner == *owner).collect::<Vec<_>>();
    if of(leases.mapped()?).is_empty() {
        return Ok(());
    }
    let locked = leases.lock()?;
    let going = of(leases.mapped()?);
    let addresses: Vec<IpAddr> = going.iter().map(|one| one.address).collect();
    hostport::remove(&addresses)?;
    let staying: HashSet<String> =
        leases.mapped()?.into_iter().filter(|one| one.owner != *owner).map(|one| one.device).collect();
    let devices: HashSet<&str> = going.iter().map(|one| one.device.as_str()).collect();
    for device in devices.into_iter().filter(|device| !staying.contains(*device)) {
        hostport::forget_device(device)?;
    }
    going.iter().try_for_each(|one| Ok(leases.forget_mapped(one, &locked)?))
}

/// Puts the bounds on traffic that are asked for.
pub(crate) fn shape(config: &Config, ends: &mut Ends<'_>) -> Result<(), PluginError> {
    let bandwidth = config.runtime.bandwidth;
    // What the pod receives is what the host's end sends.
    if let Some(rate) = bandwidth.ingress {
        let port = ends.port.ok_or(PluginError::NoHostEnd)?;
        ends.host.shape(port.index, &shape_of(rate, port.mtu_bytes)).map_err(no_shaping)?;
    }
    if let Some(rate) = bandwidth.egress {
        ends.pod.shape(ends.inside.index, &shape_of(rate, ends.inside.mtu_bytes)).map_err(no_shaping)?;
    }
    Ok(())
}

/// Whether everything that is asked for is there.
pub(crate) fn check(config: &Config, addresses: &[IpAddr], ends: &mut Ends<'_>) -> Result<(), PluginError> {
    let ports = host_ports(&config.runtime.ports, addresses);
    if let Some(port) = hostport::missing(&ports)?.first() {
        let (host, pod) = (port.port, port.pod);
        return Err(PluginError::Check(format!("the node's port {host} doesn't lead to {pod}")));
    }
    let bandwidth = config.runtime.bandwidth;
    if let Some(rate) = bandwidth.ingress {
        let port = ends.port.ok_or(PluginError::NoHostEnd)?;
        check_rate(ends.host, port, rate)?;
    }
    if let Some(rate) = bandwidth.egress {
        check_rate(ends.pod, ends.inside, rate)?;
    }
    Ok(())
}

fn check_rate(netlink: &mut Netlink, link: &Link, rate: Rate) -> Result<(), PluginError> {
    let wanted = shape_of(rate, link.mtu_bytes).bytes_per_second;
    if netlink.shaped(link.index)? == Some(wanted) {
        return Ok(());
    }
    Err(PluginError::Check(format!(
        "the rate of {} is not bounded to {} bit/s",
        link.name, rate.bits_per_second
    )))
}

/// The mappings for each address that they can lead to: of the family of the node's address, if one is named.
fn host_ports(mappings: &[PortMapping], addresses: &[IpAddr]) -> Vec<HostPort> {
    let one = |mapping: &PortMapping, pod: &IpAddr| {
        if mapping.host_ip.is_some_and(|host| host.is_ipv4() != pod.is_ipv4()) {
            return None;
        }
        Some(HostPort {
            host: mapping.host_ip.filter(|host| !host.is_unspecified()),
            port: mapping.host_port,
            protocol: match mapping.protocol {
                Protocol::Tcp => 6,
                Protocol::Udp => 17,
                Protocol::Sctp => 132,
            },
            pod: *pod,
            pod_port: mapping.container_port,
        })
    };
    mappings.iter().flat_map(|mapping| addresses.iter().filter_map(|pod| one(mapping, pod))).collect()
}

fn described(mappings: &[PortMapping]) -> String {
    let ports: Vec<String> = mappings.iter().map(|one| one.host_port.to_string()).collect();
    ports.join(", ")
}

fn shape_of(rate: Rate, mtu_bytes: u32) -> Shape {
    let bytes_per_second = (rate.bits_per_second / 8).max(1);
    let during = |ms: u64| bytes_per_second.saturating_mul(ms) / 1000;
    let burst = rate.burst_bits.map_or(during(BURST_MS).max(LEAST_BURST_BYTES), |bits| bits / 8);
    // A packet larger than the burst would never go.
    let burst_bytes = fits(burst).max(mtu_bytes + LINK_HEADER_BYTES);
    let queue_bytes = fits(during(LATENCY_MS).saturating_add(burst_bytes.into()));
    Shape { bytes_per_second, burst_bytes, queue_bytes }
}

fn fits(bytes: u64) -> u32 {
    u32::try_from(bytes).unwrap_or(u32::MAX)
}

fn no_shaping(error: weft_cni_netlink::Error) -> PluginError {
    if error.class() == Class::NotFound { PluginError::NoShaping(error) } else { error.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mapping_leads_to_every_address_of_its_family() {
        let addresses = ["10.42.1.7".parse().unwrap(), "fd00::7".parse().unwrap()];
        let mapped = |host_ip: Option<&str>| {
            let mapping = PortMapping {
                host_port: 8080,
                container_port: 80,
                protocol: Protocol::Udp,
                host_ip: host_ip.map(|ip| ip.parse().unwrap()),
            };
            let ports = host_ports(&[mapping], &addresses);
            ports.iter().map(|port| (port.pod, port.host)).collect::<Vec<_>>()
        };
        let [v4, v6] = addresses;
        assert_eq!(mapped(None), [(v4, None), (v6, None)]);
        assert_eq!(mapped(Some("0.0.0.0")), [(v4, None)]);
        assert_eq!(mapped(Some("::")), [(v6, None)]);
        assert_eq!(mapped(Some("192.0.2.1")), [(v4, "192.0.2.1".parse().ok())]);
    }

    #[test]
    fn a_bound_lets_every_packet_through_sometime() {
        let shape = |bits_per_second, burst_bits| shape_of(Rate { bits_per_second, burst_bits }, 1450);
        let one_megabit = shape(1_000_000, None);
        assert_eq!((one_megabit.bytes_per_second, one_megabit.burst_bytes), (125_000, 128 << 10));
        assert_eq!(one_megabit.queue_bytes, (128 << 10) + 3125);
        assert_eq!(shape(1, Some(1)), Shape { bytes_per_second: 1, burst_bytes: 1468, queue_bytes: 1468 });
        assert_eq!(shape(u64::MAX, Some(u64::MAX)).burst_bytes, u32::MAX);
    }
}
