//! The proxy between us and the API server, chosen as kubectl does: the kubeconfig's `proxy-url`
//! counts always; HTTPS_PROXY and HTTP_PROXY but for what NO_PROXY names, and for loopback. (kube
//! itself asks NO_PROXY about the proxy's host, not about the cluster's.)

use std::net::IpAddr;

use anyhow::{Result, bail};
use axum::http::Uri;
use hyper_util::client::proxy::matcher::Matcher;
use kube::config::Kubeconfig;

/// The `proxy-url` of a context's cluster, by default of the current one.
pub fn of_context(kubeconfig: &Kubeconfig, context: Option<&str>) -> Option<String> {
    let name = context.or(kubeconfig.current_context.as_deref())?;
    let context = kubeconfig.contexts.iter().find(|one| one.name == name)?.context.as_ref()?;
    let cluster = kubeconfig.clusters.iter().find(|one| one.name == context.cluster)?.cluster.as_ref()?;
    cluster.proxy_url.clone().filter(|url| !url.is_empty())
}

/// The proxy that leads to `cluster`, whose kubeconfig has this `proxy-url`.
///
/// # Errors
/// When its URL is none.
pub fn to(cluster: &Uri, own: Option<&str>) -> Result<Option<Uri>> {
    if let Some(url) = own {
        return parsed(url).map(Some);
    }
    let variable = if cluster.scheme_str() == Some("http") { "HTTP_PROXY" } else { "HTTPS_PROXY" };
    match environment(variable) {
        Some(url) if !is_loopback(cluster) && !excepted(cluster) => parsed(&url).map(Some),
        _ => Ok(None),
    }
}

/// A variable, in capitals or not.
fn environment(name: &str) -> Option<String> {
    let value = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    value(name).or_else(|| value(&name.to_ascii_lowercase()))
}

fn is_loopback(cluster: &Uri) -> bool {
    let host = cluster.host().unwrap_or_default().trim_matches(['[', ']']);
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// Whether NO_PROXY names the cluster's host.
fn excepted(cluster: &Uri) -> bool {
    let Some(names) = environment("NO_PROXY") else { return false };
    // It answers for any proxy.
    Matcher::builder().all("http://proxy").no(names).build().intercept(cluster).is_none()
}

/// Without a scheme it is HTTP.
fn parsed(url: &str) -> Result<Uri> {
    let url = if url.contains("://") { url.to_owned() } else { format!("http://{url}") };
    match url.parse::<Uri>() {
        Ok(uri) if uri.host().is_some() => Ok(uri),
        // It may have a password.
        _ => bail!("the proxy's URL, of the kubeconfig's proxy-url or of HTTPS_PROXY, is none"),
    }
}
