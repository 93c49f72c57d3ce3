//! Service-account tokens for projected volumes: asked for by TokenRequest, bound to the pod, renewed before their end.

use std::collections::HashMap;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::{Pod, ServiceAccount, ServiceAccountTokenProjection};
use kube::Api;
use kube::api::PostParams;
use parking_lot::Mutex;

use crate::clock;
use crate::pod::{self, PodId};

/// A token, and when to have a new one.
#[derive(Clone)]
pub(crate) struct Token {
    pub(crate) text: String,
    pub(crate) renew_at: Timestamp,
}

/// Tokens are renewed after this at the latest (upstream).
const LONGEST: Duration = Duration::from_secs(24 * 3600);
const DEFAULT_SECONDS: i64 = 3600;

/// A token belongs to a pod (by uid), an audience and a lifetime.
type Key = (String, String, i64);

/// Tokens in use, so that a volume that is written again for another reason asks for no new one.
#[derive(Default)]
pub(crate) struct Tokens {
    cache: Mutex<HashMap<Key, Token>>,
}

impl Tokens {
    /// A token that is not due for renewal.
    pub(crate) async fn get(
        &self,
        client: &kube::Client,
        pod: &Pod,
        projection: &ServiceAccountTokenProjection,
    ) -> Result<Token, kube::Error> {
        let audience = projection.audience.clone().unwrap_or_default();
        let key = (PodId::of(pod).uid, audience, projection.expiration_seconds.unwrap_or(DEFAULT_SECONDS));
        if let Some(token) = self.cache.lock().get(&key).filter(|t| t.renew_at > clock::now()) {
            return Ok(token.clone());
        }
        let token = request(client, pod, projection).await?;
        self.cache.lock().insert(key, token.clone());
        Ok(token)
    }

    /// Forgets the tokens of a pod that is gone.
    pub(crate) fn forget(&self, uid: &str) {
        self.cache.lock().retain(|(of, _, _), _| of != uid);
    }
}

/// Asks for a token for the pod's service account.
async fn request(
    client: &kube::Client,
    pod: &Pod,
    projection: &ServiceAccountTokenProjection,
) -> Result<Token, kube::Error> {
    let id = PodId::of(pod);
    let account = pod::spec(pod).service_account_name.clone().unwrap_or_else(|| "default".into());
    let seconds = projection.expiration_seconds.unwrap_or(DEFAULT_SECONDS);
    let body = TokenRequest {
        spec: Some(TokenRequestSpec {
            audiences: projection.audience.clone().filter(|a| !a.is_empty()).map(|a| vec![a]),
            expiration_seconds: Some(seconds),
            bound_object_ref: Some(BoundObjectReference {
                api_version: Some("v1".into()),
                kind: Some("Pod".into()),
                name: Some(id.name),
                uid: Some(id.uid),
            }),
        }),
        ..TokenRequest::default()
    };
    let api: Api<ServiceAccount> = Api::namespaced(client.clone(), &id.namespace);
    let asked_at = clock::now();
    let answer: TokenRequest =
        api.create_subresource("token", &account, &PostParams::default(), &body).await?;
    let status = answer.status.unwrap_or_default();
    let expires = status.expiration_timestamp.map_or(asked_at, |time| time.0);
    Ok(Token { renew_at: renew_at(asked_at, expires), text: status.token.unwrap_or_default() })
}

/// After four fifths of its life.
fn renew_at(asked: Timestamp, expires: Timestamp) -> Timestamp {
    let life = clock::until(expires, asked);
    clock::after(asked, (life * 4 / 5).min(LONGEST))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn renewed_after_four_fifths_or_a_day() {
        let at = |s| Timestamp::from_second(s).unwrap();
        assert_eq!(renew_at(at(0), at(3600)), at(2880));
        assert_eq!(renew_at(at(0), at(400_000)), at(86_400));
    }
}
