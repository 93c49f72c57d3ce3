//! What the caller adds for one container: the conventional capabilities, in `runtimeConfig`.

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};

use crate::{ConfigError, HardwareAddress};

/// What the caller adds for one container.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RuntimeConfig {
    /// `ips`: the addresses that the container must get, one of each family at most.
    pub ips: Vec<IpNetwork>,
    /// `mac`: the hardware address that it must get.
    pub mac: Option<HardwareAddress>,
    /// `portMappings`: the node's ports that lead to it.
    pub ports: Vec<PortMapping>,
    /// `bandwidth`: how much it may receive and send.
    pub bandwidth: Bandwidth,
    /// `dns`: what the result says about names.
    pub dns: Option<Dns>,
}

/// A port of the node that leads to the container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortMapping {
    /// The node's port.
    pub host_port: u16,
    /// The container's.
    pub container_port: u16,
    /// The protocol of both.
    pub protocol: Protocol,
    /// The node's address; unspecified for every one of its family, `None` for every one.
    pub host_ip: Option<IpAddr>,
}

/// A protocol with ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

/// Bounds on traffic, one for each direction as the container sees it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bandwidth {
    /// What it receives.
    pub ingress: Option<Rate>,
    /// What it sends.
    pub egress: Option<Rate>,
}

/// A bound on traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// Bits in a second.
    pub bits_per_second: u64,
    /// Bits that may go at once after silence; `None` if the caller leaves it to us.
    pub burst_bits: Option<u64>,
}

/// What a result says about names.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dns {
    /// Servers' addresses.
    #[serde(default, skip_serializing_if = "Vec::is_empty", alias = "servers")]
    pub nameservers: Vec<String>,
    /// The container's own domain.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub domain: Option<String>,
    /// Domains that short names are looked up in.
    #[serde(default, skip_serializing_if = "Vec::is_empty", alias = "searches")]
    pub search: Vec<String>,
    /// Options of the resolver.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub options: Vec<String>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct RawRuntime {
    ips: Vec<IpNetwork>,
    mac: Option<HardwareAddress>,
    port_mappings: Vec<RawMapping>,
    bandwidth: RawBandwidth,
    dns: Option<Dns>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawMapping {
    #[serde(default)]
    host_port: u32,
    container_port: u32,
    #[serde(default)]
    protocol: String,
    #[serde(default, rename = "hostIP")]
    host_ip: String,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct RawBandwidth {
    ingress_rate: u64,
    ingress_burst: u64,
    egress_rate: u64,
    egress_burst: u64,
}

impl RawRuntime {
    pub(crate) fn check(self) -> Result<RuntimeConfig, ConfigError> {
        // The conventions have a port of 0 stand for one that isn't mapped.
        let ports = self.port_mappings.into_iter().filter(|mapping| mapping.host_port != 0);
        let rates = self.bandwidth;
        Ok(RuntimeConfig {
            ips: self.ips,
            mac: self.mac,
            ports: ports.map(RawMapping::check).collect::<Result<_, _>>()?,
            bandwidth: Bandwidth {
                ingress: rate(rates.ingress_rate, rates.ingress_burst)?,
                egress: rate(rates.egress_rate, rates.egress_burst)?,
            },
            dns: self.dns,
        })
    }
}

impl RawMapping {
    fn check(self) -> Result<PortMapping, ConfigError> {
        let port = |number: u32| u16::try_from(number).ok().filter(|port| *port > 0);
        let invalid = |reason| ConfigError::Invalid { field: "runtimeConfig.portMappings", reason };
        Ok(PortMapping {
            host_port: port(self.host_port).ok_or_else(|| invalid("hostPort is no port"))?,
            container_port: port(self.container_port).ok_or_else(|| invalid("containerPort is no port"))?,
            protocol: match self.protocol.to_ascii_lowercase().as_str() {
                "tcp" | "" => Protocol::Tcp,
                "udp" => Protocol::Udp,
                "sctp" => Protocol::Sctp,
                _ => return Err(invalid("protocol is none of tcp, udp and sctp")),
            },
            host_ip: match self.host_ip.as_str() {
                "" => None,
                text => Some(text.parse().map_err(|_no_address| invalid("hostIP is no address"))?),
            },
        })
    }
}

fn rate(bits_per_second: u64, burst: u64) -> Result<Option<Rate>, ConfigError> {
    let burst_bits = (burst > 0).then_some(burst);
    match (bits_per_second, burst_bits) {
        (0, None) => Ok(None),
        (0, Some(_)) => {
            Err(ConfigError::Invalid { field: "runtimeConfig.bandwidth", reason: "has a burst and no rate" })
        }
        _ => Ok(Some(Rate { bits_per_second, burst_bits })),
    }
}
