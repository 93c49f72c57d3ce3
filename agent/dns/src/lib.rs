//! Cluster DNS, answered on the node from the node's own watch of Services and EndpointSlices.
//!
//! Every node listens at the cluster DNS address, so a look-up never leaves the node and needs no Service of its own.
//! Names follow the DNS-based service discovery specification 1.1.0; other names go to the node's own resolvers.
#![forbid(unsafe_code)]

mod answer;
mod forward;
mod index;
mod server;
mod watch;

#[doc(hidden)]
pub use server::fuzz;
use std::net::SocketAddr;
use std::sync::Arc;

use parking_lot::RwLock;
use tokio_util::sync::CancellationToken;

use crate::answer::Zone;
use crate::forward::Forwarder;
use crate::index::Index;

/// Where to listen and what to answer for.
#[derive(Clone, Debug)]
pub struct Config {
    /// Addresses and ports, for UDP and TCP: one for each family that Services have.
    pub listen: Vec<SocketAddr>,
    /// The cluster's domain, such as `cluster.local`.
    pub domain: String,
    /// Resolvers for names outside the cluster, tried in order; none makes such names fail with SERVFAIL.
    pub upstreams: Vec<SocketAddr>,
}

/// Why the cluster DNS could not start or go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The domain is no domain name.
    #[error("{domain:?} is no domain name")]
    Domain {
        /// As configured.
        domain: String,
    },
    /// The address can't be listened at.
    #[error("cannot listen at {address} for DNS")]
    Listen {
        /// Address and port.
        address: SocketAddr,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// Answers until `shutdown`. Queries are taken at once; names of the cluster are SERVFAIL until the first list is in.
///
/// # Errors
/// If the domain is wrong or the address can't be listened at.
pub async fn run(config: Config, client: kube::Client, shutdown: CancellationToken) -> Result<(), Error> {
    let zone = Zone::new(&config.domain).ok_or(Error::Domain { domain: config.domain.clone() })?;
    let index = Arc::new(RwLock::new(Index::default()));
    let mut servers = Vec::new();
    for address in &config.listen {
        let forwarder = Forwarder::new(config.upstreams.clone());
        servers.push(server::Server::bind(*address, zone.clone(), index.clone(), forwarder).await?);
    }
    let serving = futures::future::join_all(servers.into_iter().map(server::Server::serve));
    tokio::select! {
        () = shutdown.cancelled() => {}
        () = watch::keep(client, index) => {}
        _ = serving => {}
    }
    Ok(())
}

/// The resolvers that a resolv.conf names, without `own`.
pub fn upstreams(resolv_conf: &str, own: &[std::net::IpAddr]) -> Vec<SocketAddr> {
    resolv_conf
        .lines()
        .filter_map(|line| line.trim().strip_prefix("nameserver"))
        .filter_map(|address| address.trim().parse().ok())
        .filter(|address| !own.contains(address))
        .map(|address| SocketAddr::new(address, 53))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resolvers_are_read_and_this_one_is_left_out() {
        let text = "# by hand\nsearch lan\nnameserver 10.43.0.10\nnameserver fd43::a\nnameserver 192.0.2.53\n\
            nameserver fe80::1%eth0\nnameserver 2001:db8::53\n";
        let own = ["10.43.0.10", "fd43::a"].map(|address| address.parse().unwrap());
        let found: Vec<_> = upstreams(text, &own).iter().map(ToString::to_string).collect();
        assert_eq!(found, ["192.0.2.53:53", "[2001:db8::53]:53"]);
    }
}
