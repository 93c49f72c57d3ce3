//! Why a node can't say what it was asked.

use std::io;
use std::path::PathBuf;

use crate::node::NodeError;

/// Why a node can't say what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum ObserveError {
    /// A pin is not there, or may not be opened.
    #[error("cannot open the map {path:?}")]
    Open {
        /// The pin.
        path: PathBuf,
        /// Why not.
        #[source]
        source: aya::maps::MapError,
    },
    /// The map was made by another version.
    #[error("the map {map} has another layout than this program")]
    Layout {
        /// Its name.
        map: &'static str,
    },
    /// A map could not be read.
    #[error("cannot read the map {map}")]
    Read {
        /// Its name.
        map: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The kernel's routes and devices could not be read.
    #[error("cannot ask the kernel for routes and devices")]
    Netlink(#[from] weft_cni_netlink::Error),
    /// The node's cgroups or files could not be read.
    #[error(transparent)]
    Node(#[from] NodeError),
    /// The socket could not be used.
    #[error("cannot {op} the socket {path:?}")]
    Socket {
        /// What was being done.
        op: &'static str,
        /// The socket.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The agent could not answer.
    #[error("the agent says: {0}")]
    Agent(String),
    /// What came over the socket is no question or answer.
    #[error("the socket carried something else than expected")]
    Malformed(#[from] serde_json::Error),
}
