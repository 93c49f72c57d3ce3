//! Owns what a server is told at its start, and checks it whole.

use std::net::IpAddr;
use std::ops::RangeInclusive;

/// The default bound on the body of a request, as upstream's.
pub const DEFAULT_MAX_REQUEST_BYTES: usize = 3 * 1024 * 1024;

/// A certificate chain and its key, both PEM.
#[derive(Clone, Debug)]
pub struct CertifiedKeyPem {
    /// The chain, the leaf first.
    pub certificates: String,
    /// The private key, PKCS#8 or SEC1.
    pub key: String,
}

/// How the server reaches kubelets.
#[derive(Clone, Debug)]
pub struct KubeletClient {
    /// The certificate by which kubelets know this server.
    pub identity: CertifiedKeyPem,
    /// The authorities of the kubelets' serving certificates, PEM.
    pub ca: String,
}

/// The keys of service-account tokens.
#[derive(Clone, Debug)]
pub struct ServiceAccountKeys {
    /// The EC P-256 private key that signs, PEM (PKCS#8).
    pub signing_key: String,
    /// Further EC P-256 public keys that are accepted, PEM (SubjectPublicKeyInfo).
    pub verification_keys: Vec<String>,
    /// The issuer put into and demanded of tokens.
    pub issuer: String,
    /// Audiences that this server accepts; the first is the default of a token. Empty: the issuer.
    pub audiences: Vec<String>,
}

/// An IPv4 or IPv6 network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Network {
    /// The network's address.
    pub address: IpAddr,
    /// Its prefix length in bits.
    pub prefix: u8,
}

/// Everything a server needs to know.
#[derive(Clone, Debug)]
pub struct Config {
    /// The address that clients in the cluster reach this server at: the endpoint of the Service `kubernetes`.
    pub advertise_address: IpAddr,
    /// The port at that address.
    pub advertise_port: u16,
    /// The serving certificate.
    pub serving: CertifiedKeyPem,
    /// The authorities of client certificates, PEM. Also published as the cluster's root CA.
    pub client_ca: String,
    /// Keys of service-account tokens.
    pub service_accounts: ServiceAccountKeys,
    /// The networks that cluster IPs are taken from, one or one of each family; the first says the default family.
    /// They become the ServiceCIDR `kubernetes`; further ServiceCIDRs may be added while the server runs.
    pub service_cidrs: Vec<Network>,
    /// The ports that node ports are taken from.
    pub node_port_range: RangeInclusive<u16>,
    /// How kubelets are reached; without it logs and exec answer 503.
    pub kubelet_client: Option<KubeletClient>,
    /// The cluster's DNS domain.
    pub cluster_domain: String,
    /// The bound on the body of a request.
    pub max_request_bytes: usize,
    /// How long events are kept.
    pub event_ttl: std::time::Duration,
    /// How often the store is compacted; superseded revisions live at least this long.
    pub compaction_interval: std::time::Duration,
}

/// A mistake in a configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A text that isn't a network.
    #[error("{0:?} is not a network such as 10.43.0.0/16")]
    Network(String),
    /// PEM that doesn't hold what it should.
    #[error("the {what} can't be used: {reason}")]
    Pem {
        /// Which of the configured PEM texts.
        what: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// The service network is too small or too large.
    #[error(
        "the service network must be an IPv4 network of 8 to 65536 addresses, or an IPv6 one of /108 or smaller"
    )]
    ServiceNetwork,
    /// Not one service network, nor one of each family.
    #[error("there must be one service network, or one of each family")]
    ServiceFamilies,
    /// Pods can't reach that address.
    #[error("{0} can't be advertised: pods must be able to reach the API server there")]
    AdvertiseAddress(IpAddr),
    /// TLS refused the certificate or key.
    #[error("the {what} certificate can't be used")]
    Tls {
        /// Which of the configured certificates.
        what: &'static str,
        /// What TLS said.
        #[source]
        source: rustls::Error,
    },
}

impl Network {
    /// Whether `address` is in the network.
    pub fn contains(&self, address: IpAddr) -> bool {
        match (self.address, address) {
            (IpAddr::V4(_), IpAddr::V4(_)) | (IpAddr::V6(_), IpAddr::V6(_)) => {
                let (base, _) = to_bits(self.address);
                let (other, width) = to_bits(address);
                let shift = u32::from(width - self.prefix);
                shift >= 128 || base >> shift == other >> shift
            }
            _ => false,
        }
    }

    /// The number of addresses, saturating.
    pub fn size(&self) -> u64 {
        let (_, width) = to_bits(self.address);
        1u64.checked_shl(u32::from(width - self.prefix)).unwrap_or(u64::MAX)
    }

    /// The address at `offset` from the network's own.
    pub fn nth(&self, offset: u64) -> IpAddr {
        let (base, width) = to_bits(self.address);
        let shift = u32::from(width - self.prefix);
        let base = if shift >= 128 { 0 } else { base >> shift << shift };
        let bits = base + u128::from(offset);
        match self.address {
            IpAddr::V4(_) => IpAddr::V4(u32::try_from(bits & 0xffff_ffff).unwrap_or_default().into()),
            IpAddr::V6(_) => IpAddr::V6(bits.into()),
        }
    }

    /// Whether the network is IPv6.
    pub fn is_ipv6(&self) -> bool {
        self.address.is_ipv6()
    }
}

fn to_bits(address: IpAddr) -> (u128, u8) {
    match address {
        IpAddr::V4(v4) => (u128::from(u32::from(v4)), 32),
        IpAddr::V6(v6) => (u128::from(v6), 128),
    }
}

impl std::str::FromStr for Network {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let wrong = || ConfigError::Network(text.to_owned());
        let (address, prefix) = text.split_once('/').ok_or_else(wrong)?;
        let address: IpAddr = address.parse().map_err(|_ignored| wrong())?;
        let prefix: u8 = prefix.parse().map_err(|_ignored| wrong())?;
        let (_, width) = to_bits(address);
        if prefix > width {
            return Err(wrong());
        }
        Ok(Self { address, prefix })
    }
}

impl std::fmt::Display for Network {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.nth(0), self.prefix)
    }
}

impl Config {
    /// Checks what can be checked without touching anything.
    pub fn check(&self) -> Result<(), ConfigError> {
        if self.advertise_address.is_loopback() || self.advertise_address.is_unspecified() {
            return Err(ConfigError::AdvertiseAddress(self.advertise_address));
        }
        match self.service_cidrs.as_slice() {
            [_] => {}
            [one, other] if one.is_ipv6() != other.is_ipv6() => {}
            _ => return Err(ConfigError::ServiceFamilies),
        }
        for network in &self.service_cidrs {
            let bound = if network.is_ipv6() { 1 << 20 } else { 1 << 16 };
            if !(8..=bound).contains(&network.size()) {
                return Err(ConfigError::ServiceNetwork);
            }
        }
        Ok(())
    }

    /// The cluster IP of the Service `kubernetes`: the first of the first network. None before [`Config::check`] passes.
    pub fn kubernetes_service_ip(&self) -> Option<IpAddr> {
        self.service_cidrs.first().map(|network| network.nth(1))
    }

    /// The families that Services can have, the default one first.
    pub(crate) fn service_families(&self) -> Vec<&'static str> {
        self.service_cidrs.iter().map(|network| if network.is_ipv6() { "IPv6" } else { "IPv4" }).collect()
    }

    /// The audiences that tokens for this server carry.
    pub fn audiences(&self) -> Vec<String> {
        if self.service_accounts.audiences.is_empty() {
            vec![self.service_accounts.issuer.clone()]
        } else {
            self.service_accounts.audiences.clone()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks() {
        let net: Network = "10.43.7.9/16".parse().unwrap();
        assert_eq!(net.to_string(), "10.43.0.0/16");
        assert_eq!(net.nth(1).to_string(), "10.43.0.1");
        assert!(net.contains("10.43.255.1".parse().unwrap()));
        assert!(!net.contains("10.44.0.1".parse().unwrap()));
        assert!(!net.contains("::1".parse().unwrap()));
        assert_eq!(net.size(), 65536);
        assert!("10.0.0.0/33".parse::<Network>().is_err());
    }
}
