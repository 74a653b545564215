//! The pages for people, as a browser shows them. Screenshots are left in
//! `TARGET/screenshots`, to be looked at.

use std::path::PathBuf;

use e2e::endpoint::{Endpoint, curl, file, manifest, noise};
use e2e::{ok, target_dir, tool};
use oscontainer_artifact::manifest::{Manifest, PACKAGES};

/// Stores a version whose manifest names packages.
fn store(endpoint: &Endpoint, version: &str, packages: &str) {
    let tarball = noise(1_000_000, 70);
    let mut manifest = Manifest::parse(&manifest("demo-x86_64-host", version, &tarball)).unwrap();
    manifest.annotations.insert(PACKAGES.to_owned(), packages.to_owned());
    assert_eq!(endpoint.put(&file("demo-x86_64-host", version, "repo.tar"), &tarball).status, 201);
    assert_eq!(endpoint.put(&file("demo-x86_64-host", version, "manifest.json"), &manifest.to_bytes()).status, 201);
}

/// What Chromium does with a page.
fn chromium(arguments: &[&str], url: &str) -> String {
    let profile = tempfile::tempdir().unwrap();
    let mut command = tool("chromium");
    command.args(["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage"]);
    command.arg(format!("--user-data-dir={}", profile.path().display())).args(arguments).arg(url);
    ok(&mut command).stdout
}

/// Takes a screenshot; gives its width and height in pixels, as its PNG header says.
fn screenshot(name: &str, arguments: &[&str], url: &str) -> (PathBuf, (u32, u32)) {
    let dir = target_dir().join("screenshots");
    std::fs::create_dir_all(&dir).unwrap();
    let path = dir.join(name);
    let mut all = vec![format!("--screenshot={}", path.display())];
    all.extend(arguments.iter().map(|&argument| argument.to_owned()));
    chromium(&all.iter().map(String::as_str).collect::<Vec<_>>(), url);
    let png = std::fs::read(&path).unwrap();
    let number = |at: usize| u32::from_be_bytes(png[at..at + 4].try_into().unwrap());
    (path, (number(16), number(20)))
}

#[test]
fn a_browser_shows_versions_and_what_changed_between_them() {
    let endpoint = Endpoint::start();
    store(&endpoint, "1.0", "bash-5.2.15-2.x86_64 kernel-6.1.0-1.x86_64 old-1-1.noarch vim-2:9.0-1.x86_64");
    store(
        &endpoint,
        "1.1",
        "bash-5.2.15-3.x86_64 kernel-6.1.0-1.x86_64 kernel-6.1.0-2.x86_64 new-lib-2-1.noarch vim-2:9.0-1.x86_64",
    );
    store(
        &endpoint,
        "1.2",
        "bash-5.2.15-3.x86_64 kernel-6.1.0-1.x86_64 kernel-6.1.0-2.x86_64 new-lib-2-1.noarch vim-2:9.0-1.x86_64",
    );
    let (front, compared) = (endpoint.url("/"), endpoint.url("/compare/demo-x86_64-host/1.0/1.1"));
    let text = chromium(&["--dump-dom"], &compared);
    for part in ["2 changed, 1 added, 1 removed", "5.2.15-2 → 5.2.15-3", "6.1.0-1 → 6.1.0-1, 6.1.0-2", "new-lib", "old"]
    {
        assert!(text.contains(part), "{part} is missing in\n{text}");
    }
    assert!(!text.contains("vim"), "it did not change:\n{text}");
    assert!(chromium(&["--dump-dom"], &endpoint.url("/compare/demo-x86_64-host/1.1/1.2")).contains("the same"));
    assert!(chromium(&["--dump-dom"], &front).contains("What changed since 1.1"));
    // The form leads there without a script; the browser follows its redirect.
    let form = endpoint.url("/compare/demo-x86_64-host?from=1.0&to=1.1");
    assert!(chromium(&["--dump-dom"], &form).contains("5.2.15-2 → 5.2.15-3"));
    for (path, status) in [
        ("/compare/demo-x86_64-host?from=1.0&to=9", 400),
        ("/compare/demo-x86_64-host", 400),
        ("/compare/demo-x86_64-host/1.0/9", 404),
        ("/compare/other/1/2", 404),
        ("/compare/..%2f/1/2", 404),
    ] {
        assert_eq!(endpoint.curl(path, &[]).status, status, "{path}");
    }

    let dark = "--blink-settings=preferredColorScheme=0";
    for (name, size, settings) in
        [("desk", "1100,1400", None), ("phone", "412,1800", None), ("phone-dark", "412,1800", Some(dark))]
    {
        for (page, url) in [("front", &front), ("compare", &compared)] {
            let window = format!("--window-size={size}");
            let arguments: Vec<_> = [Some(window.as_str()), settings].into_iter().flatten().collect();
            let (path, (width, height)) = screenshot(&format!("endpoint-{page}-{name}.png"), &arguments, url);
            assert_eq!(format!("{width},{height}"), size, "{}", path.display());
        }
    }
    links_are_relative(&endpoint, &front);
}

/// Links lead on wherever the endpoint is mounted: none is absolute.
fn links_are_relative(endpoint: &Endpoint, front: &str) {
    let html = ok(curl().arg(front)).stdout;
    for link in html.split("href=\"").skip(1).chain(html.split("action=\"").skip(1)) {
        let link = link.split('"').next().unwrap();
        assert!(!link.starts_with('/'), "{link} in {front}");
        let status = endpoint.curl(&format!("/{link}"), &[]).status;
        assert!([200, 400].contains(&status), "{link}: {status}");
    }
}
