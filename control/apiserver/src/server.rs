//! Owns the server as a whole: its start, its listeners, its clients within the process, its end.

use crate::api::Api;
use crate::authn::{KeyError, TokenKeys, Tokens};
use crate::authz::Authorizer;
use crate::backend::BackendProxy;
use crate::background;
use crate::bootstrap::{self, BootstrapError};
use crate::cache::{Cache, FeedError};
use crate::config::{Config, ConfigError};
use crate::identity::User;
use crate::kubelet::KubeletProxy;
use crate::metrics::Metrics;
use crate::resources::Resources;
use crate::transport::{self, InProcess, tls};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use weft_control_store::Store;

/// Why a server couldn't start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The configuration is wrong.
    #[error("the configuration of the API server is wrong")]
    Config(#[from] ConfigError),
    /// The keys of service-account tokens can't be used.
    #[error("the service-account keys can't be used")]
    Keys(#[from] KeyError),
    /// The store can't be read.
    #[error("the API server couldn't read its store")]
    Cache(#[from] FeedError),
    /// The cluster's first objects couldn't be written.
    #[error("the cluster's first objects couldn't be written")]
    Bootstrap(#[from] BootstrapError),
}

/// The listener failed for good.
#[derive(Debug, thiserror::Error)]
#[error("the API server's listener failed")]
pub struct ServeError(#[source] std::io::Error);

/// An API server. It works until it is shut down or dropped.
pub struct Server {
    api: Arc<Api>,
    acceptor: TlsAcceptor,
    tasks: TaskTracker,
}

impl Server {
    /// Starts a server: checks the configuration, loads the cache, writes what every cluster has.
    pub async fn start(config: Config, store: Arc<dyn Store>) -> Result<Self, StartError> {
        config.check()?;
        let tls = tls::server_config(&config.serving, &config.client_ca)?;
        let accounts = &config.service_accounts;
        let keys = TokenKeys::new(&accounts.signing_key, &accounts.verification_keys)?;
        let (tasks, shutdown) = (TaskTracker::new(), CancellationToken::new());
        let kubelet = match &config.kubelet_client {
            Some(client) => Some(KubeletProxy::new(client, tasks.clone(), shutdown.clone())?),
            None => None,
        };
        let resources = Arc::new(Resources::new());
        let cache = Arc::new(Cache::new(resources.clone()));
        cache.load(store.as_ref()).await?;
        let api = Arc::new(Api {
            tokens: Tokens::new(keys, accounts.issuer.clone(), config.audiences(), cache.clone()),
            authorizer: Authorizer::new(&cache),
            metrics: Metrics::new(),
            bootstrapped: AtomicBool::new(false),
            config,
            store: store.clone(),
            cache: cache.clone(),
            resources,
            kubelet,
            backends: BackendProxy::new(tasks.clone(), shutdown.clone())?,
            closing: shutdown.child_token(),
            shutdown: shutdown.clone(),
        });
        let server = Self { api: api.clone(), acceptor: TlsAcceptor::from(Arc::new(tls)), tasks };
        server.tasks.spawn(async move { cache.follow(store, shutdown).await });
        bootstrap::bootstrap(&api).await?;
        api.bootstrapped.store(true, Ordering::Release);
        server.tasks.spawn(background::run(api));
        Ok(server)
    }

    /// Serves HTTPS on a listener until `shutdown`, then ends all watches and lets requests in progress end.
    /// Clients within the process can still read and write until the server is stopped or dropped.
    pub async fn serve(&self, listener: TcpListener, shutdown: CancellationToken) -> Result<(), ServeError> {
        transport::serve(self.api.clone(), self.acceptor.clone(), listener, shutdown)
            .await
            .map_err(ServeError)
    }

    /// A client within the process. It is authenticated as `user`, and authorized like everybody.
    pub fn client(&self, user: &str, groups: &[&str]) -> kube::Client {
        let mut user = User::new(user, groups);
        if let (Some((namespace, name)), true) = (user.as_service_account(), groups.is_empty()) {
            user = User::service_account(namespace, name, "");
        }
        kube::Client::new(InProcess::new(self.api.clone(), user), "default")
    }

    /// Ends watches and background work, and waits for them.
    pub async fn stop(&self) {
        self.api.shutdown.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.api.shutdown.cancel();
    }
}
