//! Questions to a node and its answers, as they stand on the socket and in `-o json`.

use std::collections::BTreeSet;
use std::fmt;
use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};
use weft_ebpf_abi::{
    Address, Port, SCOPE_EXTERNAL, SCOPE_INTERNAL, SCTP, SERVICE_CHECK_SOURCE, SERVICE_DROP_EMPTY,
    SERVICE_HASHED, SERVICE_KEEP_SOURCE, SERVICE_WATCHED, ServiceKey, TCP, UDP,
};

use super::flows::Seen;
use super::health::Health;
use super::listeners::{Listener as ListenerOf, Listening as ListeningOf};
use super::path::Path;
use super::probe::Probed;
use super::tracked::Tracked;
use crate::why::policy::{PolicyQuery, PolicyVerdict};
use crate::why::{Query, Trace};

/// Who listens where, asked.
pub type Listener = ListenerOf;
/// Who listens where, answered.
pub type Listening = ListeningOf;

/// A question.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Request {
    /// All addresses and ports that are Services.
    Frontends,
    /// Some of them with their backends, and backends that may be in no list.
    Entries {
        /// Addresses and ports.
        frontends: Vec<FrontendKey>,
        /// Backends.
        backends: Vec<BackendKeyed>,
    },
    /// What becomes of a connection.
    Why(Query),
    /// What a pod's policies say of a connection.
    Policy(PolicyQuery),
    /// Which way packets to an address leave the node.
    Path {
        /// The address.
        to: IpAddr,
    },
    /// Whether a process listens.
    Listening(Listener),
    /// What a process of the node gets from an address, over HTTP.
    Probe {
        /// The address.
        to: SocketAddr,
    },
    /// What the dataplane stands on.
    Health,
    /// Flows that the pods' edges remember.
    Tracked {
        /// Only those that were used in the last seconds.
        within_seconds: u32,
    },
    /// Which of these pods, by their uids, have a way that no policy on trial is about.
    NotOnTrial {
        /// The pods.
        pods: BTreeSet<String>,
    },
    /// Which other nodes don't answer this one.
    Silent,
    /// Which backends' connections failed, of Services that want to know.
    Ejected,
    /// Flows, from now until the connection ends.
    Flows {
        /// Only what is refused or dropped.
        drops_only: bool,
    },
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Answer {
    /// To [`Request::Frontends`].
    Frontends(Vec<Frontend>),
    /// To [`Request::Entries`].
    Entries(Entries),
    /// To [`Request::Why`].
    Why(Trace),
    /// To [`Request::Policy`].
    Policy(PolicyVerdict),
    /// To [`Request::Path`].
    Path(Path),
    /// To [`Request::Listening`].
    Listening(Listening),
    /// To [`Request::Probe`].
    Probed(Probed),
    /// To [`Request::Health`].
    Health(Health),
    /// To [`Request::Tracked`].
    Tracked(Tracked),
    /// To [`Request::NotOnTrial`].
    NotOnTrial(BTreeSet<String>),
    /// To [`Request::Silent`]: their addresses.
    Silent(BTreeSet<IpAddr>),
    /// To [`Request::Ejected`].
    Ejected(Vec<Ejected>),
    /// To [`Request::Flows`], again and again.
    Seen(Seen),
}

/// What a question of one kind is answered with.
pub trait FromAnswer: Sized {
    /// `None` for an answer of another kind.
    fn from_answer(answer: Answer) -> Option<Self>;
}

macro_rules! from_answer {
    ($($variant:ident: $type:ty),*) => {$(
        impl FromAnswer for $type {
            fn from_answer(answer: Answer) -> Option<Self> {
                if let Answer::$variant(inner) = answer { Some(inner) } else { None }
            }
        }
    )*};
}
from_answer!(Frontends: Vec<Frontend>, Entries: Entries, Why: Trace, Path: Path, Listening: Listening, Probed: Probed, Health: Health,
    Policy: PolicyVerdict, Silent: BTreeSet<IpAddr>, Tracked: Tracked,
    NotOnTrial: BTreeSet<String>, Ejected: Vec<Ejected>);

/// A transport protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

impl Protocol {
    /// Its number in an IP header.
    #[must_use]
    pub const fn number(self) -> u8 {
        match self {
            Self::Tcp => TCP,
            Self::Udp => UDP,
            Self::Sctp => SCTP,
        }
    }

    /// The protocol of a number.
    #[must_use]
    pub const fn from_number(number: u8) -> Option<Self> {
        match number {
            TCP => Some(Self::Tcp),
            UDP => Some(Self::Udp),
            SCTP => Some(Self::Sctp),
            _ => None,
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        })
    }
}

impl std::str::FromStr for Protocol {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.to_ascii_lowercase().as_str() {
            "tcp" => Ok(Self::Tcp),
            "udp" => Ok(Self::Udp),
            "sctp" => Ok(Self::Sctp),
            _ => Err(format!("{text:?} is no protocol: tcp, udp or sctp")),
        }
    }
}

/// Where traffic starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Scope {
    /// On the node or in a pod.
    Inside,
    /// Outside the cluster.
    Outside,
}

/// An address and port that may be a Service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FrontendKey {
    /// The address; the unspecified one of a family for any address of the node (a NodePort).
    pub address: IpAddr,
    /// The port.
    pub port: u16,
    /// The protocol.
    pub protocol: Protocol,
    /// Whose traffic.
    pub scope: Scope,
}

impl fmt::Display for FrontendKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { address, port, protocol, .. } = self;
        match address {
            address if address.is_unspecified() => write!(f, "node:{port}/{protocol}"),
            address => write!(f, "{}/{protocol}", SocketAddr::new(*address, *port)),
        }
    }
}

impl From<FrontendKey> for ServiceKey {
    fn from(key: FrontendKey) -> Self {
        Self {
            address: Address::from(key.address),
            port: Port::new(key.port),
            protocol: key.protocol.number(),
            scope: match key.scope {
                Scope::Inside => SCOPE_INTERNAL,
                Scope::Outside => SCOPE_EXTERNAL,
            },
        }
    }
}

impl TryFrom<ServiceKey> for FrontendKey {
    type Error = ();

    /// Fails for an entry that only marks an address as a Service's: it has no protocol.
    fn try_from(key: ServiceKey) -> Result<Self, Self::Error> {
        Ok(Self {
            address: key.address.into(),
            port: key.port.get(),
            protocol: Protocol::from_number(key.protocol).ok_or(())?,
            scope: if key.scope == SCOPE_EXTERNAL { Scope::Outside } else { Scope::Inside },
        })
    }
}

/// An endpoint's address and port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BackendKeyed {
    /// The address.
    pub address: IpAddr,
    /// The port.
    pub port: u16,
    /// The protocol.
    pub protocol: Protocol,
}

impl fmt::Display for BackendKeyed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        SocketAddr::new(self.address, self.port).fmt(f)
    }
}

/// An address and port that is a Service, as the maps have it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Frontend {
    /// Which.
    #[serde(flatten)]
    pub key: FrontendKey,
    /// Number of its list of backends.
    pub list: u32,
    /// Places in the list.
    pub count: u32,
    /// Seconds of affinity by client; 0 for none.
    pub affinity_seconds: u32,
    /// What is special about it: [`flag_names`].
    pub flags: Vec<String>,
    /// The backends in the list, if they were asked for.
    #[serde(default)]
    pub backends: Vec<Backend>,
}

/// A backend, as the maps have it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Backend {
    /// Which.
    #[serde(flatten)]
    pub key: BackendKeyed,
    /// It takes new flows; without, it only finishes what it has.
    pub active: bool,
    /// A flow that began with another generation ends.
    pub generation: u32,
    /// Its places in the list; 0 if no list was asked for.
    pub slots: u32,
}

/// A backend that is ejected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Ejected {
    /// Which.
    #[serde(flatten)]
    pub key: BackendKeyed,
    /// Seconds until it is tried again.
    pub seconds_left: u32,
}

/// An answer to [`Request::Entries`]; what the maps don't have is not in it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Entries {
    /// Addresses and ports.
    pub frontends: Vec<Frontend>,
    /// Backends.
    pub backends: Vec<Backend>,
}

/// Names of the flags of a Service's entry.
#[must_use]
pub fn flag_names(flags: u32) -> Vec<String> {
    let known = [
        (SERVICE_KEEP_SOURCE, "keep-source"),
        (SERVICE_CHECK_SOURCE, "check-source"),
        (SERVICE_HASHED, "hashed"),
        (SERVICE_DROP_EMPTY, "drop-empty"),
        (SERVICE_WATCHED, "watched"),
    ];
    let set = known.iter().filter(|(bit, _)| flags & bit != 0);
    set.map(|(_, name)| (*name).to_owned()).collect()
}
