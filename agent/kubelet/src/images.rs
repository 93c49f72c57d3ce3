//! Image policy: whether a container's image is there, and what to say if it is not. Images are imported, not pulled.

use k8s_openapi::api::core::v1::{Container, Pod};
use weft_agent_runtime::Image;

use crate::events::Kind;
use crate::shared::Shared;

/// Why there is no image: the container's waiting reason and message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Missing {
    pub(crate) reason: &'static str,
    pub(crate) message: String,
}

/// The policy, with upstream's default by tag.
fn policy(container: &Container) -> &str {
    if let Some(policy) = container.image_pull_policy.as_deref().filter(|p| !p.is_empty()) {
        return policy;
    }
    let image = container.image.as_deref().unwrap_or_default();
    let last = image.rsplit('/').next().unwrap_or_default();
    let latest = !image.contains('@') && last.split_once(':').is_none_or(|(_, tag)| tag == "latest");
    if latest { "Always" } else { "IfNotPresent" }
}

/// Finds the image on the node and records the Events that belong to it.
pub(crate) async fn ensure(shared: &Shared, pod: &Pod, container: &Container) -> Result<Image, Missing> {
    let image = container.image.as_deref().unwrap_or_default();
    let say = |kind, reason, message: String| {
        shared.events.container(pod, &container.name, (kind, reason), message);
    };
    match shared.runtime.image_status(image).await {
        Ok(Some(found)) => {
            say(
                Kind::Normal,
                "Pulled",
                format!(
                    "Container image \"{image}\" already present on machine and can be accessed by the pod"
                ),
            );
            Ok(found)
        }
        Ok(None) if policy(container) == "Never" => {
            let message = format!("Container image \"{image}\" is not present with pull policy of Never");
            say(Kind::Warning, "ErrImageNeverPull", message.clone());
            say(Kind::Warning, "Failed", "Error: ErrImageNeverPull".to_owned());
            Err(Missing { reason: "ErrImageNeverPull", message })
        }
        Ok(None) => {
            let message =
                format!("image \"{image}\" is not on this node, which does not pull from registries yet");
            say(Kind::Normal, "Pulling", format!("Pulling image \"{image}\""));
            say(Kind::Warning, "Failed", format!("Failed to pull image \"{image}\": {message}"));
            say(Kind::Warning, "Failed", "Error: ErrImagePull".to_owned());
            Err(Missing { reason: "ErrImagePull", message })
        }
        Err(weft_agent_runtime::Error::Invalid { reason, .. }) => {
            let message = format!("Failed to apply default image tag \"{image}\": {reason}");
            say(Kind::Warning, "InspectFailed", message.clone());
            say(Kind::Warning, "Failed", "Error: InvalidImageName".to_owned());
            Err(Missing { reason: "InvalidImageName", message })
        }
        Err(error) => {
            let message = format!("Failed to inspect image \"{image}\": {error}");
            say(Kind::Warning, "InspectFailed", message.clone());
            Err(Missing { reason: "ImageInspectError", message })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_policy_follows_the_tag() {
        let policy =
            |image: &str| policy(&Container { image: Some(image.into()), ..Container::default() }).to_owned();
        assert_eq!(policy("nginx"), "Always");
        assert_eq!(policy("host:5000/nginx"), "Always");
        assert_eq!(policy("nginx:latest"), "Always");
        assert_eq!(policy("nginx:1.22"), "IfNotPresent");
        assert_eq!(policy("nginx@sha256:00"), "IfNotPresent");
    }
}
