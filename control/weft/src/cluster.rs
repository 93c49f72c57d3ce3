//! What a cluster was made with, kept in its data directory, so that it resumes as it was.

use std::net::Ipv4Addr;
use std::path::Path;

use ipnetwork::{IpNetwork, Ipv4Network};
use serde::{Deserialize, Serialize};

use crate::pki;

/// Name that the cluster DNS answers for.
pub(crate) const DOMAIN: &str = "cluster.local";
/// Port of the kubelet on each node.
pub(crate) const KUBELET_PORT: u16 = 10250;

/// Everything that must not change between two starts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Cluster {
    pub(crate) cluster_cidr: Ipv4Network,
    pub(crate) service_cidr: Ipv4Network,
    /// Network that joins the nodes, and holds this machine's address where it has none of its own.
    pub(crate) underlay_cidr: Ipv4Network,
    pub(crate) nodes: Vec<String>,
    /// Addresses for Services of type LoadBalancer.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) load_balancer_pools: Vec<IpNetwork>,
}

/// Why the cluster's record can't be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("cannot read {path:?}")]
    Read {
        path: std::path::PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("{path:?} is damaged")]
    Damaged {
        path: std::path::PathBuf,
        #[source]
        source: serde_json::Error,
    },
    #[error("cannot keep the cluster's record")]
    Write(#[from] pki::Error),
    #[error(
        "this cluster was made with {present} node(s), not {wanted}; remove it first with `weft down --purge`"
    )]
    OtherNodes { present: usize, wanted: usize },
}

impl Cluster {
    /// Refuses a number of nodes other than the cluster was made with; makes nothing.
    pub(crate) fn check(path: &Path, nodes: Option<u8>) -> Result<Option<Self>, Error> {
        let Some(cluster) = Self::read(path)? else { return Ok(None) };
        let (present, wanted) = (cluster.nodes.len(), nodes.map_or(cluster.nodes.len(), usize::from));
        if wanted == present { Ok(Some(cluster)) } else { Err(Error::OtherNodes { present, wanted }) }
    }

    /// The record in the data directory, or a new one with `nodes` nodes.
    pub(crate) fn open(path: &Path, nodes: Option<u8>, hostname: &str) -> Result<Self, Error> {
        if let Some(cluster) = Self::check(path, nodes)? {
            return Ok(cluster);
        }
        let cluster = Self::new(nodes.unwrap_or(1), hostname);
        let text = serde_json::to_string_pretty(&cluster)
            .map_err(|source| Error::Damaged { path: path.to_path_buf(), source })?;
        pki::write(path, &text, 0o644)?;
        Ok(cluster)
    }

    /// The record, if there is one.
    pub(crate) fn read(path: &Path) -> Result<Option<Self>, Error> {
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(Error::Read { path: path.to_path_buf(), source }),
        };
        let cluster = serde_json::from_str(&text);
        cluster.map(Some).map_err(|source| Error::Damaged { path: path.to_path_buf(), source })
    }

    fn new(nodes: u8, hostname: &str) -> Self {
        let network = |second, prefix| {
            Ipv4Network::new(Ipv4Addr::new(10, second, 0, 0), prefix).expect("the prefix is within 0..=32")
        };
        let names = if nodes == 1 {
            vec![node_name(hostname)]
        } else {
            (1..=nodes).map(|number| format!("node-{number}")).collect()
        };
        Self {
            cluster_cidr: network(42, 16),
            service_cidr: network(43, 16),
            underlay_cidr: network(44, 24),
            nodes: names,
            load_balancer_pools: Vec::new(),
        }
    }

    /// First address of the service range: the API's own Service.
    pub(crate) fn api_service_ip(&self) -> Ipv4Addr {
        offset(self.service_cidr, 1)
    }

    /// Tenth address of the service range: the cluster DNS.
    pub(crate) fn dns_ip(&self) -> Ipv4Addr {
        offset(self.service_cidr, 10)
    }

    /// This machine's address on the underlay.
    pub(crate) fn underlay_gateway(&self) -> Ipv4Addr {
        offset(self.underlay_cidr, 1)
    }

    /// The address of a node on the underlay; nodes are counted from 0.
    pub(crate) fn underlay_address(&self, index: usize) -> Ipv4Addr {
        offset(self.underlay_cidr, 2 + u32::try_from(index).unwrap_or(0))
    }
}

fn offset(network: Ipv4Network, by: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(network.network()) + by)
}

/// A host name as a node's name: lower case, and a DNS subdomain.
fn node_name(hostname: &str) -> String {
    let name: String = hostname
        .to_lowercase()
        .chars()
        .map(|c| if c.is_ascii_lowercase() || c.is_ascii_digit() || c == '.' { c } else { '-' })
        .collect();
    let name = name.trim_matches(['-', '.']).to_owned();
    if name.is_empty() { "node-1".to_owned() } else { name }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cluster_resumes_as_it_was_made() {
        let path = std::env::temp_dir().join(format!("weft-cluster-{}.json", std::process::id()));
        let made = Cluster::open(&path, Some(3), "Host").unwrap();
        assert_eq!(made.nodes, ["node-1", "node-2", "node-3"]);
        assert_eq!(Cluster::open(&path, None, "Host").unwrap(), made);
        let other = Cluster::open(&path, Some(2), "Host").unwrap_err();
        assert!(other.to_string().contains("3 node(s), not 2"), "{other}");
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn names_and_addresses_follow_from_the_record() {
        let cluster = Cluster::new(1, "My_Host.local.");
        assert_eq!(cluster.nodes, ["my-host.local"]);
        assert_eq!(cluster.api_service_ip(), Ipv4Addr::new(10, 43, 0, 1));
        assert_eq!(cluster.dns_ip(), Ipv4Addr::new(10, 43, 0, 10));
        assert_eq!(cluster.underlay_address(1), Ipv4Addr::new(10, 44, 0, 3));
    }
}
