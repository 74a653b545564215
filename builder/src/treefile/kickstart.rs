//! The part of kickstart files that rpm-ostree takes as treefiles: package lists.

use super::fields::Treefile;

/// What one kickstart file says.
#[derive(Debug, Default)]
pub struct Kickstart {
    /// Packages to install.
    pub install: Vec<String>,
    /// Packages to leave out.
    pub exclude: Vec<String>,
    /// Whether weak dependencies are left out.
    pub exclude_weakdeps: bool,
    /// Files to read next, relative to the directory of the first.
    pub includes: Vec<String>,
}

impl Kickstart {
    /// Parses a kickstart file.
    ///
    /// # Errors
    /// The line, from 1, and what is wrong with it.
    pub fn parse(text: &str) -> Result<Self, (usize, String)> {
        let mut kickstart = Self::default();
        let mut section = None;
        for (number, line) in (1..).zip(text.lines()) {
            let line = if line.starts_with('#') { "" } else { line.trim() };
            match section {
                _ if line.is_empty() => {}
                Some(_) if line == "%end" => section = None,
                Some(_) => match line.strip_prefix('-') {
                    Some(package) => kickstart.exclude.push(package.to_owned()),
                    None => kickstart.install.push(line.to_owned()),
                },
                None => {
                    let words = shlex::split(line).ok_or((number, "a quote is not closed".to_owned()))?;
                    let words: Vec<&str> = words.iter().map(String::as_str).collect();
                    match words.as_slice() {
                        // An indented comment.
                        [] => {}
                        ["%include", path] => kickstart.includes.push((*path).to_owned()),
                        ["%include", ..] => return Err((number, "expected %include and one path".to_owned())),
                        ["%packages"] => section = Some(number),
                        ["%packages", "--exclude-weakdeps"] => {
                            section = Some(number);
                            kickstart.exclude_weakdeps = true;
                        }
                        ["%packages", ..] => {
                            return Err((number, "%packages takes --exclude-weakdeps only".to_owned()));
                        }
                        _ => {
                            return Err((
                                number,
                                format!(
                                    "expected %packages or %include, found {line:?}: of a kickstart file a treefile takes packages only"
                                ),
                            ));
                        }
                    }
                }
            }
        }
        match section {
            Some(start) => Err((start, "%packages has no %end".to_owned())),
            None => Ok(kickstart),
        }
    }

    /// Adds what an included file says.
    pub fn include(&mut self, included: Self) {
        self.install.extend(included.install);
        self.exclude.extend(included.exclude);
        self.exclude_weakdeps |= included.exclude_weakdeps;
    }

    /// The same as a treefile.
    pub fn into_treefile(self) -> Treefile {
        Treefile {
            packages: Some(self.install.into_iter().collect()),
            exclude_packages: Some(self.exclude),
            recommends: self.exclude_weakdeps.then_some(false),
            ..Treefile::default()
        }
    }
}
