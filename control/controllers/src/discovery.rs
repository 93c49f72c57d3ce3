//! Owns the question which resources the API server has.

use kube::Client;
use kube::core::ApiResource;
use kube::discovery::{ApiCapabilities, Discovery, Scope};

/// A resource that can be listed and deleted.
#[derive(Clone, Debug)]
pub(crate) struct Resource {
    pub(crate) api: ApiResource,
    pub(crate) namespaced: bool,
    capabilities: ApiCapabilities,
}

impl Resource {
    pub(crate) fn supports(&self, verb: &str) -> bool {
        self.capabilities.supports_operation(verb)
    }

    /// `pods`, `deployments.apps`.
    pub(crate) fn name(&self) -> String {
        match self.api.group.as_str() {
            "" => self.api.plural.clone(),
            group => format!("{}.{group}", self.api.plural),
        }
    }
}

/// The deletable resources, each in the version that its group prefers.
pub(crate) async fn deletable(client: &Client) -> kube::Result<Vec<Resource>> {
    let discovery = Discovery::new(client.clone()).run_aggregated().await?;
    let all = discovery.groups().flat_map(|group| group.recommended_resources());
    let all = all.map(|(api, capabilities)| {
        let namespaced = matches!(capabilities.scope, Scope::Namespaced);
        Resource { api, namespaced, capabilities }
    });
    Ok(all.filter(|r| r.supports("delete") && r.supports("list")).collect())
}
