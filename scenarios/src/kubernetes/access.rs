//! Identities: kubeconfigs, tokens and clients.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use k8s_openapi::api::{
    authentication::v1::{TokenRequest, TokenRequestSpec},
    core::v1::ServiceAccount,
};
use kube::{
    Api, Client, Config,
    api::PostParams,
    config::{
        AuthInfo, Cluster, Context, KubeConfigOptions, Kubeconfig, NamedAuthInfo, NamedCluster,
        NamedContext,
    },
};

use super::{
    Error,
    credentials::{Credentials, write_private},
};

const NAME: &str = "lab";
/// Longer than a lab lives, so that nothing has to renew it.
const TOKEN_SECONDS: i64 = 24 * 3600;

/// A client with the identity of a kubeconfig.
pub(crate) async fn client(kubeconfig: &Path) -> Result<Client, Error> {
    let read = Kubeconfig::read_from(kubeconfig);
    let failed = |source| Error::Kubeconfig {
        path: PathBuf::from(kubeconfig),
        source,
    };
    let config =
        Config::from_custom_kubeconfig(read.map_err(failed)?, &KubeConfigOptions::default())
            .await
            .map_err(failed)?;
    Client::try_from(config).map_err(Error::api(format!(
        "a client from {}",
        kubeconfig.display()
    )))
}

pub(super) async fn service_account_token(
    client: Client,
    namespace: &str,
    name: &str,
) -> Result<String, Error> {
    let doing =
        format!("a token for service account {namespace}/{name} (are the manifests applied?)");
    let request = TokenRequest {
        spec: TokenRequestSpec {
            expiration_seconds: Some(TOKEN_SECONDS),
            ..TokenRequestSpec::default()
        },
        ..TokenRequest::default()
    };
    let accounts: Api<ServiceAccount> = Api::namespaced(client, namespace);
    let answer = accounts
        .create_token_request(name, &PostParams::default(), &request)
        .await
        .map_err(Error::api(doing.clone()))?;
    answer
        .status
        .map(|status| status.token)
        .ok_or_else(|| Error::Yaml {
            what: doing,
            reason: "no status".into(),
        })
}

pub(super) fn write_admin(
    path: &Path,
    server: SocketAddr,
    credentials: &Credentials,
) -> Result<(), Error> {
    let user = AuthInfo {
        client_certificate: Some(shown(&credentials.admin.certificate)),
        client_key: Some(shown(&credentials.admin.key)),
        ..AuthInfo::default()
    };
    write(path, server, credentials, "admin", user)
}

pub(super) fn write_token(
    path: &Path,
    server: SocketAddr,
    credentials: &Credentials,
    user: &str,
    token: String,
) -> Result<(), Error> {
    write(
        path,
        server,
        credentials,
        user,
        AuthInfo {
            token: Some(token.into()),
            ..AuthInfo::default()
        },
    )
}

fn write(
    path: &Path,
    server: SocketAddr,
    credentials: &Credentials,
    user: &str,
    auth_info: AuthInfo,
) -> Result<(), Error> {
    let cluster = Cluster {
        server: Some(format!("https://{server}")),
        certificate_authority: Some(shown(&credentials.ca)),
        ..Cluster::default()
    };
    let context = Context {
        cluster: NAME.into(),
        user: Some(user.into()),
        ..Context::default()
    };
    let other = BTreeMap::new;
    let config = Kubeconfig {
        kind: Some("Config".into()),
        api_version: Some("v1".into()),
        clusters: vec![NamedCluster {
            name: NAME.into(),
            cluster: Some(cluster),
            other: other(),
        }],
        auth_infos: vec![NamedAuthInfo {
            name: user.into(),
            auth_info: Some(auth_info),
            other: other(),
        }],
        contexts: vec![NamedContext {
            name: NAME.into(),
            context: Some(context),
            other: other(),
        }],
        current_context: Some(NAME.into()),
        ..Kubeconfig::default()
    };
    let yaml = serde_saphyr::to_string(&config).map_err(|error| Error::Yaml {
        what: shown(path),
        reason: error.to_string(),
    })?;
    write_private(path, &yaml)
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}
