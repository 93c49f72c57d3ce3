//! The API server: authentication, authorization, admission, the registry of objects, and the watch cache that
//! every reader is answered from.
#![forbid(unsafe_code)]

mod accept;
mod admission;
mod alloc;
mod api;
mod authn;
mod authz;
mod backend;
mod background;
mod body;
mod bootstrap;
mod cache;
mod config;
#[doc(hidden)]
pub mod fuzz;
mod handler;
mod identity;
mod kubelet;
mod metrics;
mod nonresource;
mod registry;
mod reply;
mod request_info;
mod resources;
mod reviews;
mod server;
mod transport;

pub use authn::KeyError;
pub use bootstrap::BootstrapError;
pub use cache::FeedError;
pub use config::{
    CertifiedKeyPem, Config, ConfigError, DEFAULT_MAX_REQUEST_BYTES, KubeletClient, Network,
    ServiceAccountKeys,
};
pub use identity::User;
pub use server::{ServeError, Server, StartError};
