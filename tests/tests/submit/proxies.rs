//! Through which proxy `submit` asks the cluster: as kubectl, of which the last test is.

use std::fs;
use std::process::Command;

use e2e::proxy::Tunnels;
use e2e::{fails, ok, run, tool};
use serde_json::Value;

use crate::Setting;

/// Nobody listens there.
const DEAD: &str = "http://127.0.0.1:9";
/// The name in the stand-in's certificate, which nothing here resolves.
const NAME: &str = "kubernetes.default.svc:443";

/// Changes the kubeconfig's cluster.
fn configure(setting: &Setting, change: impl FnOnce(&mut Value)) {
    let path = setting.dir.path().join("kubeconfig");
    let mut config: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    change(&mut config["clusters"][0]["cluster"]);
    fs::write(&path, config.to_string()).unwrap();
}

/// One question to the cluster, with these variables.
fn ask(setting: &Setting, variables: &[(&str, &str)]) -> Command {
    with(setting.submit(&["--dry-run=server"]), variables)
}

fn with(mut command: Command, variables: &[(&str, &str)]) -> Command {
    for name in ["HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "NO_PROXY"] {
        command.env_remove(name).env_remove(name.to_lowercase());
    }
    command.envs(variables.iter().copied());
    command
}

#[test]
fn the_environments_proxy_leads_to_the_cluster() {
    let setting = Setting::new();
    let tunnels = Tunnels::start(&setting.cluster.address);
    configure(&setting, |cluster| cluster["server"] = format!("https://{NAME}").into());
    let proxy = format!("http://{}", tunnels.address());
    for variables in [
        [("HTTPS_PROXY", proxy.as_str()), ("NO_PROXY", "10.0.0.0/8, .example,127.0.0.1")],
        [("https_proxy", tunnels.address()), ("no_proxy", "default.example")],
    ] {
        let before = tunnels.asked().len();
        ok(&mut ask(&setting, &variables));
        let asked = tunnels.asked();
        assert!(asked.len() > before && asked.iter().all(|name| name == NAME), "{asked:?}");
    }
    let proxy = proxy.replace("//", "//jane:s%40cret@");
    ok(&mut ask(&setting, &[("HTTPS_PROXY", &proxy)]));
    // The base64 of jane:s@cret.
    assert_eq!(tunnels.asked().last().unwrap(), &format!("{NAME} Basic amFuZTpzQGNyZXQ="));

    // Exempt, its name leads nowhere.
    let before = tunnels.asked().len();
    for names in ["kubernetes.default.svc", ".svc", "*"] {
        let done = run(&mut ask(&setting, &[("HTTPS_PROXY", &proxy), ("NO_PROXY", names)]));
        assert!(done.code == 1 && done.stderr.contains("dns error"), "{names}: {done:?}");
    }
    assert_eq!(tunnels.asked().len(), before);
    // A word that is no URL.
    fails(&mut ask(&setting, &[("HTTPS_PROXY", "http://")]), 2, "prox");
}

#[test]
fn a_proxy_that_is_not_for_the_cluster_is_not_asked() {
    let setting = Setting::new();
    ok(&mut ask(&setting, &[("HTTPS_PROXY", DEAD), ("NO_PROXY", "127.0.0.1")]));
    ok(&mut ask(&setting, &[("HTTPS_PROXY", DEAD), ("NO_PROXY", "127.0.0.0/8")]));
    // Loopback is never proxied, and HTTP_PROXY is for HTTP.
    ok(&mut ask(&setting, &[("HTTPS_PROXY", DEAD)]));
    ok(&mut ask(&setting, &[("HTTP_PROXY", DEAD)]));
}

#[test]
fn the_kubeconfigs_proxy_is_always_asked() {
    let setting = Setting::new();
    let tunnels = Tunnels::start(&setting.cluster.address);
    configure(&setting, |cluster| cluster["proxy-url"] = format!("http://{}", tunnels.address()).into());
    let variables = [("HTTPS_PROXY", DEAD), ("NO_PROXY", "127.0.0.1")];
    ok(&mut ask(&setting, &variables));
    let asked = tunnels.asked();
    assert!(!asked.is_empty() && asked.iter().all(|name| *name == setting.cluster.address), "{asked:?}");
    // So does kubectl.
    let mut kubectl = tool("kubectl");
    kubectl.args(["get", "jobs", "-n", e2e::kubernetes::COMPOSE]);
    kubectl.env("KUBECONFIG", setting.dir.path().join("kubeconfig")).env("HOME", setting.dir.path());
    ok(&mut with(kubectl, &variables));
    assert!(tunnels.asked().len() > asked.len());
}
